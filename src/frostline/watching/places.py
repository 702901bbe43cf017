"""Where in the user's code something was done, and what a value is called there."""

from __future__ import annotations

import ast
import dis
import inspect
import linecache
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

_OURS = str(Path(__file__).resolve().parents[1])
_TORCH = str(Path(torch.__file__).resolve().parent)


@dataclass(frozen=True)
class Place:
    """A line of code. ``path`` is as it is shown: relative to the working directory where it lies inside."""

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


def frames() -> Iterator[FrameType]:
    """The frames of running code, innermost first, without torch's and ours."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not is_hidden(frame.f_code.co_filename):
            yield frame
        frame = frame.f_back


def caller(*, own: bool = False) -> Place | None:
    """The innermost line of the user's own code; a library's where there is none.

    ``own``: None unless it is the user's own line that did it, with no library in between.
    """
    first: FrameType | None = None
    for frame in frames():
        if not is_library(frame.f_code.co_filename):
            return place_of(frame)
        if own:
            return None
        first = first or frame
    return None if first is None else place_of(first)


def place_of(frame: FrameType) -> Place:
    """The first line of the statement that a frame is in."""
    filename = frame.f_code.co_filename
    return Place(_shown(filename), _statements(filename).get(frame.f_lineno, frame.f_lineno))


@cache
def _statements(filename: str) -> dict[int, int]:
    """Every line of a file -> the first line of the innermost statement that it belongs to."""
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except (SyntaxError, ValueError):
        return {}
    found: dict[int, int] = {}
    for node in ast.walk(tree):  # outer statements come first
        if isinstance(node, ast.stmt) and node.end_lineno is not None:
            inner = getattr(node, "body", None)
            last = node.end_lineno if not isinstance(inner, list) else node.lineno
            found.update(dict.fromkeys(range(node.lineno, last + 1), node.lineno))
    return found


def variables_of(frame: FrameType) -> dict[str, Any]:
    """The variables of running code, by name.

    Before Python 3.13 a function's are read through one dict that lives as long as the frame, and that ``locals()``
    gives out: it is emptied again, or left alone where the function may hold it.
    """
    if sys.version_info >= (3, 13) or not frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        return dict(frame.f_locals)
    if _reads_its_locals(frame.f_code):
        return {}
    read = frame.f_locals
    found = dict(read)
    if sys.getrefcount(read) == 3:  # the frame's, ours, and that of the call: nobody else got it
        read.clear()
    return found


@cache
def _reads_its_locals(code: CodeType) -> bool:
    return any(
        each.argval == "f_locals" or (each.argval in _READERS and each.opname == "LOAD_GLOBAL")
        for each in dis.get_instructions(code)
        if isinstance(each.argval, str)
    )


_READERS = ("locals", "vars", "eval", "exec")  # (`model.eval()` is no LOAD_GLOBAL)


def called(value: Any) -> str:
    """The variable that names a value in running code, the user's own first; '' if none does."""
    library = ""
    for frame in frames():
        for name, each in variables_of(frame).items():
            if each is value and name.isidentifier() and name != "self" and not name.startswith("__"):
                if not is_library(frame.f_code.co_filename):
                    return name
                library = library or name
    return library


def around(module: nn.Module) -> nn.Module:
    """The largest module that running code can name and that has ``module`` inside; itself if there is none."""
    best, size = module, 0
    seen: set[int] = set()
    for frame in frames():
        for each in variables_of(frame).values():
            if isinstance(each, nn.Module) and each is not module and id(each) not in seen:
                seen.add(id(each))
                inside = [id(m) for m in each.modules()]
                if len(inside) > size and id(module) in inside:
                    best, size = each, len(inside)
    return best


def holding(parameter: nn.Parameter) -> nn.Module | None:
    """The largest module that running code can name and that a parameter is in."""
    best: nn.Module | None = None
    size = 0
    seen: set[int] = set()
    for frame in frames():
        for each in variables_of(frame).values():
            if isinstance(each, nn.Module) and id(each) not in seen and not isinstance(each, torch.jit.ScriptModule):
                seen.add(id(each))
                inside = [id(p) for p in each.parameters()]
                if len(inside) > size and id(parameter) in inside:
                    best, size = each, len(inside)
    return best


def expression(model: nn.Module, variable: str, name: str) -> str:
    """How code would write a parameter or module: ``model[2].weight``.

    >>> expression(nn.Sequential(nn.Linear(1, 1)), "model", "0.weight")
    'model[0].weight'
    """
    text, here = variable, model
    for part in name.split(".") if name else ():
        if part.isdigit() and isinstance(here, (nn.Sequential, nn.ModuleList)):
            text += f"[{part}]"
        elif part.isidentifier():
            text += f".{part}"
        else:
            text = f'{text}.get_submodule("{part}")'
        here = getattr(here, part)
    return text


@cache
def is_library(filename: str) -> bool:
    """Whether a file was installed rather than written by the user."""
    return any(part in ("site-packages", "dist-packages") for part in Path(filename).parts) or (
        filename.startswith(("<frozen", str(Path(sys.base_prefix) / "lib")))
    )


@cache
def is_hidden(filename: str) -> bool:
    """Whether a file is torch's, ours or Python's own."""
    return filename.startswith((_OURS, _TORCH, "<frozen"))


@cache
def _shown(filename: str) -> str:
    try:
        return str(Path(filename).resolve().relative_to(Path.cwd()))
    except ValueError:
        return Path(filename).name if is_library(filename) else filename
