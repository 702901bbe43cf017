"""A model in memory, its inputs and its loss, written to a file for the workers to read."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from frostline.errors import FrostlineError

INSTEAD = 'name a function that builds it instead: fl.measure("file.py:name", ...), which returns (model, inputs, loss)'


def write(path: Path, model: nn.Module, inputs: Any, loss: Any) -> None:
    """Write them, weights, modes and all.

    Raises:
        FrostlineError: one of them cannot be pickled (a lambda, a class inside a function), or could not be read in
            another process (defined in the script that is running).
    """
    for what, value in (("the model", model), ("the loss", loss), ("the inputs", inputs)):
        home = _in_main(value)
        if home:
            raise FrostlineError(
                f"{what} cannot be sent to another process: {home} is defined in the script itself. Import it from a "
                f"module, or {INSTEAD}"
            )
        try:
            pickle.dumps(value) if what == "the loss" else None
        except Exception as error:
            raise _refusal(what, error) from error
    try:
        torch.save({"model": model, "inputs": inputs, "loss": loss}, path)
    except Exception as error:
        raise _refusal("the model or its inputs", error) from error


def read(path: Path) -> tuple[nn.Module, Any, Any]:
    """Read what `write` wrote. The file is our own: it is trusted."""
    try:
        found = torch.load(path, weights_only=False, map_location=None)
    except (AttributeError, ImportError, pickle.UnpicklingError) as error:
        raise FrostlineError(f"the model cannot be read in another process ({error}): {INSTEAD}") from error
    return found["model"], found["inputs"], found["loss"]


def _refusal(what: str, error: Exception) -> FrostlineError:
    return FrostlineError(f"{what} cannot be sent to another process ({error}): {INSTEAD}")


def _in_main(value: Any) -> str:
    """The name of a class or function of ``__main__`` that ``value`` is made of; '' if there is none."""
    modules = value.modules() if isinstance(value, nn.Module) else ()
    for each in (*(type(m) for m in modules), value, type(value)):
        if getattr(each, "__module__", "") == "__main__":
            return str(getattr(each, "__qualname__", each))
    return ""
