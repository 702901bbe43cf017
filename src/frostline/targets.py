"""TARGET -> a model, its inputs and its loss."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from frostline.errors import TargetError
from frostline.integrations.transformers import default_inputs, made_up, model_from_config

_RETURNS = "a model, (model, inputs) or (model, inputs, loss)"


@dataclass(frozen=True)
class Target:
    """What a TARGET gave.

    Attributes:
        name: tells targets of one table apart.
        step: instead of inputs and loss, the whole step: model -> scalar.
        as_found: the modules' modes are the target's own, and stay.
        note: what a reader should know of where it comes from.
    """

    name: str
    model: nn.Module
    inputs: Any
    loss: Any
    step: Any = None
    as_found: bool = False
    note: str = ""


def load(
    spec: str,
    inputs: Sequence[str] = (),
    model_class: str | None = None,
    loss: str | None = None,
    *,
    weights: bool = False,
) -> Target:
    """Load one TARGET.

    Args:
        spec: ``file.py:name``, ``package.module:name``, the path of a ``config.json`` or its folder, or a training
            script, ``"train.py ARGS"``, which is run until its second step.
        inputs: what ``--input`` asked for; takes the place of what the target returns.
        model_class: for a config.
        loss: takes the place of the target's.
        weights: build the model of a config with (random) weights, to be run; otherwise on ``meta``.

    Raises:
        TargetError: it is missing, or does not give a model. What its own code raises is passed on with a note.
    """
    script = _script(spec)
    if script:
        return _recorded(spec, script, inputs, model_class, loss)
    if is_config(spec):
        name = Path(spec).parent.name if Path(spec).name == "config.json" else Path(spec).stem
        model, given, given_loss = model_from_config(spec, model_class, "cpu" if weights else "meta"), None, None
    else:
        if model_class is not None:
            raise TargetError(f"--model-class is for a config.json, and {spec!r} is none")
        name = spec.rpartition(":")[2]
        model, given, given_loss = _call(spec)
    if inputs:
        given = _asked(inputs, model)
    elif given is None:
        given = _default(spec, model)
    return Target(name or spec, model, given, loss or given_loss)


def is_config(spec: str) -> bool:
    """Whether a TARGET is the path of a config, or of the folder that holds one."""
    path = Path(spec)
    if path.suffix == ".json":
        if not path.is_file():
            raise TargetError(f"there is no file {spec!r}")
        return True
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise TargetError(f"the folder {spec!r} holds no config.json")
        return True
    return False


def _script(spec: str) -> list[str]:
    """The parts of a TARGET that is a script and its arguments; none if it is something else."""
    if Path(spec).is_file():
        parts = [spec]
    else:
        try:
            parts = shlex.split(spec)
        except ValueError:
            return []
    return parts if parts and parts[0].endswith(".py") and Path(parts[0]).is_file() else []


def _recorded(spec: str, script: list[str], inputs: Sequence[str], model_class: str | None, loss: str | None) -> Target:
    from frostline.watching.recorded import recorded_step

    for option, value in (("--input", inputs), ("--model-class", model_class), ("--loss", loss)):
        if value:
            raise TargetError(f"{option} is not for a training script: {spec!r} has its own")
    try:
        found = recorded_step(script[0], script[1:])
    except TargetError as error:
        names = _defined(script[0])
        if names:
            error.add_note(f"a TARGET that is a function is written {script[0]}:NAME. {_offer(names)}")
        raise
    name = Path(script[0]).stem
    return Target(name, found.model, found.inputs, found.loss, found.step, as_found=True, note=found.note)


def _call(spec: str) -> tuple[nn.Module, Any, Any]:
    source, colon, name = spec.rpartition(":")
    if not colon:
        source, name = spec, ""
    module = _module(source, spec)
    if not name:
        raise TargetError(f"TARGET {spec!r} names no function. Write {source}:NAME. {_offers(module)}")
    if not hasattr(module, name):
        close = difflib.get_close_matches(name, _functions(module), 1, 0.5)
        hint = f" Did you mean {close[0]!r}?" if close else f" {_offers(module)}"
        raise TargetError(f"{source} has no {name!r}.{hint}")
    found = getattr(module, name)
    if isinstance(found, nn.Module):
        return found, None, None
    if not callable(found):
        raise TargetError(f"{spec} is {_kind(found)}. It must be a function that returns {_RETURNS}.")
    _check_arguments(found, spec)
    try:
        result = found()
    except Exception as error:
        error.add_note(f"frostline: raised by TARGET {spec}")
        raise
    return _parts(result, spec)


def _module(source: str, spec: str) -> ModuleType:
    if source.endswith(".py") or "/" in source:
        path = Path(source)
        if not path.is_file():
            raise TargetError(f"there is no file {source!r} (TARGET {spec!r})")
        return _run_file(path, spec)
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(source)
    except ModuleNotFoundError as error:
        if error.name is None or not (source == error.name or source.startswith(f"{error.name}.")):
            error.add_note(f"frostline: raised while importing TARGET {spec}")
            raise
        raise TargetError(
            f"there is no module {source!r}. TARGET is file.py:name, package.module:name, or the path of a config.json."
        ) from error
    except Exception as error:
        error.add_note(f"frostline: raised while importing TARGET {spec}")
        raise


def _run_file(path: Path, spec: str) -> ModuleType:
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = f"frostline_target_{path.stem}_{abs(hash(path.resolve())):x}"
    if name in sys.modules:
        return sys.modules[name]
    module_spec = importlib.util.spec_from_file_location(name, path)
    if module_spec is None or module_spec.loader is None:
        raise TargetError(f"{path} is not a Python file (TARGET {spec!r})")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if isinstance(error, SystemExit):
            raise TargetError(f"{path} ended the program while it was loaded: guard it by __name__") from error
        error.add_note(f"frostline: raised while loading TARGET {spec}")
        raise
    return module


def _functions(module: ModuleType) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]


def _defined(path: str) -> list[str]:
    """The functions that a file defines, without running it."""
    tree = ast.parse(Path(path).read_bytes())
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]


def _offers(module: ModuleType) -> str:
    return _offer(_functions(module))


def _offer(names: list[str]) -> str:
    return f"It defines {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}." if names else "It defines none."


def _check_arguments(found: Any, spec: str) -> None:
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise TargetError(f"{spec} is called without arguments, and needs some ({error})") from error
    except ValueError:  # a builtin without a signature
        pass


def _parts(result: Any, spec: str) -> tuple[nn.Module, Any, Any]:
    if isinstance(result, nn.Module):
        return result, None, None
    if isinstance(result, (tuple, list)) and 1 <= len(result) <= 3 and isinstance(result[0], nn.Module):
        model, inputs, loss = (*result, None, None)[:3]
        return model, inputs, loss
    raise TargetError(f"{spec} returned {_kind(result)}. It must return {_RETURNS}.")


def _kind(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}: {', '.join(type(v).__name__ for v in value[:4])}"
    return f"{type(value).__name__}"


def _default(spec: str, model: nn.Module) -> Any:
    """Inputs nobody gave: the config's kind, or what the model itself calls its dummy inputs."""
    made = default_inputs(model)
    if made is not None:
        return made
    try:
        dummy = getattr(model, "dummy_inputs", None)
    except Exception:  # a property of the user's library
        dummy = None
    if dummy is not None:
        return dummy
    raise TargetError(
        f"{spec} gives a {type(model).__name__} without inputs. Return (model, inputs), or say their shape: "
        "--input 8x128, --input input_ids=8x128:int64"
    )


def _asked(texts: Sequence[str], model: nn.Module) -> Any:
    """What ``--input`` asks for: positional, or by keyword if every one has a name."""
    asked: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {}
    named = 0
    for position, text in enumerate(texts):
        match = re.fullmatch(r"(?:([A-Za-z_]\w*)=)?(\d+(?:x\d+)*)(?::(\w+))?", text.strip())
        if match is None:
            raise TargetError(f"--input {text!r} cannot be read: write [NAME=]8x128[:int64]")
        name, shape, dtype = match.groups()
        named += name is not None
        asked[name or str(position)] = (tuple(int(size) for size in shape.split("x")), _dtype(dtype))
    if named not in (0, len(texts)):
        raise TargetError("give a name to every --input, or to none")
    main = getattr(model, "main_input_name", None)
    if not named and len(asked) == 1 and hasattr(model, "config") and isinstance(main, str):
        asked = {main: asked["0"]}
        named = 1
    tensors = made_up(asked, model)
    return tensors if named else tuple(tensors.values())


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise TargetError(f"--input: torch has no dtype {name!r}; write float32, bfloat16, int64 ...")
    return dtype
