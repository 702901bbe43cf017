"""Where in the user's code something was done, and how code there would write a part of a model."""

from __future__ import annotations

import ast
import dis
import inspect
import keyword
import linecache
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
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
    """A line of code. ``path`` is as it is shown: relative to the working directory where it lies inside.

    ``scopes``: those whose variables it can name, innermost first.
    """

    path: str
    line: int
    scopes: tuple[str, ...] = field(default=(), compare=False, repr=False)

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
    return Place(_shown(filename), _statements(filename).get(frame.f_lineno, frame.f_lineno), scopes_of(frame))


def scopes_of(frame: FrameType) -> tuple[str, str]:
    """The function that a frame's line is in, and the globals that this sees."""
    while frame.f_code.co_name in ("<listcomp>", "<setcomp>", "<dictcomp>") and frame.f_back is not None:
        frame = frame.f_back  # (code before the statement is not in the comprehension)
    code = frame.f_code
    return f"{code.co_filename}:{code.co_firstlineno}:{code.co_name}", str(id(frame.f_globals))


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


def is_outermost(frame: FrameType) -> bool:
    """Whether it is a module's own code, whose variables are the module's."""
    return not frame.f_code.co_flags & inspect.CO_OPTIMIZED and frame.f_locals is frame.f_globals


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


def expression(model: nn.Module, variable: str, name: str) -> str:
    """How code would write a parameter or module: ``model[2].weight``.

    >>> expression(nn.Sequential(nn.Linear(1, 1)), "model", "0.weight")
    'model[0].weight'
    """
    text, here = variable, model
    for part in name.split(".") if name else ():
        if part.isdigit() and isinstance(here, (nn.Sequential, nn.ModuleList, nn.ParameterList)):
            text += f"[{part}]"
        elif part.isidentifier() and not keyword.iskeyword(part):
            text += f".{part}"
        elif isinstance(here, (nn.ModuleDict, nn.ParameterDict)):
            text += f'["{part}"]'
        else:
            text = f'getattr({text}, "{part}")'
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
