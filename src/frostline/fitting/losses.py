"""The tensors that a loss function brings with it: labels of a fixed batch have to grow with it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import CellType, FunctionType
from typing import Any

from torch import Tensor

from frostline.tracing.step import map_tensors

Change = Callable[[Tensor], Tensor]

_DEPTH = 4  # functions inside functions


def tensors_of(loss: Any, depth: int = _DEPTH) -> Iterator[tuple[str, Tensor]]:
    """The tensors a function reads beside its arguments, by name.

    They lie in its closure, its defaults, the globals it reads, or the arguments of a ``functools.partial``.
    """
    if isinstance(loss, functools.partial):
        yield from _found("", loss.args, depth)
        for name, value in loss.keywords.items():
            yield from _found(name, value, depth)
        yield from tensors_of(loss.func, depth - 1)
    elif isinstance(loss, FunctionType):
        for name, value in (*_cells(loss), *_globals(loss), *(loss.__kwdefaults__ or {}).items()):
            yield from _found(name, value, depth)
        yield from _found("", loss.__defaults__ or (), depth)


def with_tensors(loss: Any, change: Change, depth: int = _DEPTH) -> Any:
    """The same function, every such tensor changed; the one given stays as it is."""
    if depth <= 0:
        return loss
    if isinstance(loss, functools.partial):
        keywords = {name: _changed(value, change, depth) for name, value in loss.keywords.items()}
        return functools.partial(
            with_tensors(loss.func, change, depth - 1), *_changed(loss.args, change, depth), **keywords
        )
    if not isinstance(loss, FunctionType):
        return loss
    own = {name: _changed(value, change, depth) for name, value in _globals(loss)}
    held = dict(_cells(loss))
    cells = tuple(
        CellType(_changed(held[name], change, depth)) if name in held else cell
        for name, cell in zip(loss.__code__.co_freevars, loss.__closure__ or (), strict=True)
    )
    defaults = _changed(loss.__defaults__, change, depth)
    copy = FunctionType(loss.__code__, {**loss.__globals__, **own}, loss.__name__, defaults, cells)
    copy.__kwdefaults__ = _changed(loss.__kwdefaults__, change, depth)
    return copy


def _found(name: str, value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    if depth <= 0:
        return
    if isinstance(value, (FunctionType, functools.partial)):
        yield from tensors_of(value, depth - 1)
        return
    seen: list[Tensor] = []
    map_tensors(value, lambda tensor: seen.append(tensor) or tensor)  # type: ignore[func-returns-value]
    for number, tensor in enumerate(seen):
        yield (f"{name}.{number}" if name and len(seen) > 1 else name or str(number)), tensor


def _changed(value: Any, change: Change, depth: int) -> Any:
    if isinstance(value, (FunctionType, functools.partial)):
        return with_tensors(value, change, depth - 1)
    return map_tensors(value, change)


def _cells(function: FunctionType) -> Iterator[tuple[str, Any]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:  # empty still
            continue
        if value is not function:
            yield name, value


def _globals(function: FunctionType) -> Iterator[tuple[str, Any]]:
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if isinstance(value, Tensor):
            yield name, value
