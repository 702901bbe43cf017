"""What running code calls its models and optimizers, and in which of its scopes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn

from frostline.watching.places import frames, is_library, is_outermost, scopes_of, variables_of

WRAPPERS = {"OptimizedModule": "_orig_mod", "DistributedDataParallel": "module", "DataParallel": "module"}
"""Modules that compile another, or spread it over devices: where that is inside."""
_MOST_ITEMS = 100  # of a dict or list


class Names:
    """Looks at the scopes of running code when told to; the first name that a scope has for something stays."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[weakref.ref[Any], dict[str, str]]] = {}

    def look(self) -> None:
        seen: set[int] = set()
        for frame in frames():
            own, shared = scopes_of(frame)
            if not is_outermost(frame):
                self._note_all(own, nameable(frame))
            if not is_library(frame.f_code.co_filename) and id(frame.f_globals) not in seen:
                seen.add(id(frame.f_globals))
                self._note_all(shared, _written(frame.f_globals))

    def of(self, value: Any) -> dict[str, str]:
        """Scope -> the name there; more are added as they are seen."""
        found = self._found.get(id(value))
        if found is None or found[0]() is not value:
            found = self._found[id(value)] = weakref.ref(value), {}
        return found[1]

    def _note_all(self, scope: str, named: Iterator[tuple[str, Any]]) -> None:
        for name, value in named:
            if isinstance(value, (nn.Module, torch.optim.Optimizer)):
                self.of(value).setdefault(scope, name)
                inner = WRAPPERS.get(type(value).__name__)
                if inner is not None and isinstance(getattr(value, inner, None), nn.Module):
                    self.of(getattr(value, inner)).setdefault(scope, f"{name}.{inner}")


def nameable(frame: FrameType) -> Iterator[tuple[str, Any]]:
    """What code in a frame can name, and how: variables first, then what is in ``self``, dicts and lists."""
    return _written(variables_of(frame))


def _written(variables: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    plain = [(name, value) for name, value in list(variables.items()) if name.isidentifier() and name[:2] != "__"]
    holder = variables.get("self")
    if not isinstance(holder, nn.Module):
        attributes = getattr(holder, "__dict__", {})
        plain += [(f"self.{name}", value) for name, value in list(attributes.items()) if name.isidentifier()]
    yield from plain
    for name, value in plain:
        if type(value) is dict and len(value) <= _MOST_ITEMS:
            yield from ((f'{name}["{key}"]', each) for key, each in value.items() if _is_plain(key))
        elif type(value) in (list, tuple) and len(value) <= _MOST_ITEMS:
            yield from ((f"{name}[{number}]", each) for number, each in enumerate(value))


def _is_plain(key: Any) -> bool:
    return isinstance(key, str) and key.isprintable() and not set('"\\') & set(key)


def shown(value: Any) -> str:
    """What the user's innermost code calls a value, as one word: ``self.teacher`` and ``nets["teacher"]`` are both
    ``teacher``. '' if nothing names it.
    """
    library = ""
    for frame in frames():
        for name, each in nameable(frame):
            word = _word(name)
            if each is value and word:
                if not is_library(frame.f_code.co_filename):
                    return word
                library = library or word
    return library


def _word(name: str) -> str:
    word = name.removesuffix('"]').replace('["', ".").rpartition(".")[2]
    return word if word.isidentifier() and word != "self" else ""


def around(module: nn.Module) -> nn.Module:
    """The largest module that running code can name and that has ``module`` inside; itself if there is none."""
    return _largest(nn.Module.modules, module) or module


def holding(parameter: nn.Parameter) -> nn.Module | None:
    """The largest module that running code can name and that a parameter is in."""
    return _largest(nn.Module.parameters, parameter)


def _largest(inside: Any, value: Any) -> nn.Module | None:
    """Of the modules that running code can name, the one with the most ``inside``, ``value`` among them."""
    best: nn.Module | None = None
    size = 0
    seen: set[int] = set()
    for frame in frames():
        for _, each in nameable(frame):
            if not isinstance(each, nn.Module) or isinstance(each, torch.jit.ScriptModule) or id(each) in seen:
                continue
            seen.add(id(each))
            numbers = [id(one) for one in inside(each)]
            if len(numbers) > size and id(value) in numbers:
                best, size = each, len(numbers)
    return best
