"""Patterns of names, and what to say where one matches nothing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from frostline.errors import SubsetError
from frostline.subsets.built_ins import built_in
from frostline.subsets.names import Names, listed
from frostline.subsets.slices import TensorSlice


@dataclass(frozen=True)
class Found:
    """What one item of ``train=`` stands for: whole parameters (None) or slices of them."""

    pattern: str
    parts: dict[str, tuple[TensorSlice, ...] | None]
    note: str = ""


def find(names: Names, pattern: str) -> Found:
    """Resolve one pattern, without its ``!``."""
    if pattern.startswith("@"):
        chosen, note = built_in(names, pattern)
        return Found(pattern, dict.fromkeys(chosen), note)
    base, cut = (pattern, None) if pattern in names.aliases else _cut(pattern)
    matched = _matching(base, names.aliases)
    if cut is not None:
        if not matched:
            _refuse_slice_of_module(names, pattern, base)
            raise _nothing(names, base, pattern)
        parts: dict[str, tuple[TensorSlice, ...] | None] = {}
        for name in names.canonical(matched):
            part = TensorSlice.parse(cut, names.params[name].shape, name)
            parts[name] = None if part.is_whole else (part,)
        return Found(pattern, parts, names.tie_note(matched))
    modules = _matching(base, names.modules) if base and base not in names.aliases else []
    inside = [alias for module in modules for alias in names.aliases_in(module)]
    matched = list(dict.fromkeys([*matched, *inside]))
    if not matched:
        if modules:
            kinds = ", ".join(f"{name!r} ({type(names.modules[name]).__name__})" for name in modules[:3])
            raise SubsetError(f"{pattern!r} matches {kinds}, which holds no parameters.")
        raise _nothing(names, base, pattern)
    return Found(pattern, dict.fromkeys(names.canonical(matched)), names.tie_note(matched))


def split(text: str) -> list[str]:
    """Part a string at its commas; those inside brackets belong to a slice."""
    if "[" not in text and "]" not in text:
        return [part.strip() for part in text.split(",") if part.strip()]
    parts, depth, start = [], 0, 0
    for at, char in enumerate(text):
        depth += (char == "[") - (char == "]")
        if depth < 0 or depth > 1:
            raise SubsetError(f"{text!r}: a bracket at position {at} that does not fit. Write one pair at a time.")
        if char == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    if depth:
        raise SubsetError(f"{text!r}: a '[' is never closed.")
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def _cut(pattern: str) -> tuple[str, str | None]:
    """Part a pattern from its trailing slice: a last bracket that holds ``:`` or ``,``."""
    found = re.fullmatch(r"(?P<name>.*)(?P<slice>\[[^\[\]]*[:,][^\[\]]*\])", pattern)
    return (found["name"].strip(), found["slice"]) if found else (pattern, None)


def _is_glob(pattern: str) -> bool:
    return any(char in pattern for char in "*?[")


def _matching(pattern: str, known: Mapping[str, object]) -> list[str]:
    """Return the names that a pattern matches: itself if it is one of them, or as a glob."""
    if pattern in known:
        return [pattern]
    return [name for name in known if fnmatchcase(name, pattern)] if _is_glob(pattern) else []


def _refuse_slice_of_module(names: Names, pattern: str, base: str) -> None:
    """Raise if the name before a slice is a module's."""
    modules = [name for name in _matching(base, names.modules) if names.aliases_in(name)]
    if modules:
        raise SubsetError(
            f"{pattern!r}: {modules[0]!r} is a module ({type(names.modules[modules[0]]).__name__}) and only "
            f"a parameter can be sliced. It holds {listed(names.params_of(modules[0]), 4)}."
        )


def _nothing(names: Names, base: str, pattern: str) -> SubsetError:
    """Say that a pattern matches nothing, what comes closest, and what to do."""
    kind = type(names.model).__name__
    if not names.params:
        return SubsetError(f"{pattern!r} matches nothing: {kind} has no parameters.")
    if any(name == base for name, _ in names.model.named_buffers(remove_duplicate=False)):
        return SubsetError(f"{base!r} is a buffer of {kind}, not a parameter: buffers do not train.")
    close = _closest(names, base, params_only=base != pattern)
    shown = [f"{name} (module)" if name in names.modules else name for name in close[:4]]
    nearby = f"Closest: {', '.join(shown)}" if close else f"It holds {listed(names.outline(), 4)}"
    message = f"{pattern!r} matches no parameter or module of {kind}. {nearby}."
    literal = base.strip("*.")
    if not _is_glob(literal) and literal and any(literal in alias for alias in names.aliases):
        return SubsetError(f"{message} Write '*{literal}*' for every name that holds it.")
    return SubsetError(f"{message} Print every name with [name for name, _ in model.named_parameters()].")


def _closest(names: Names, base: str, params_only: bool = False) -> list[str]:
    """Return the names most like one that matched nothing, best first; none if none is like it."""
    literal = re.sub(r"\[[^\]]*\]|[*?!]", "", base).strip(".")
    if not literal:
        return []
    known = [] if params_only else [name for name in names.modules if name and names.aliases_in(name)]
    known += names.aliases
    close = [name for name in known if name.endswith(literal) or literal.endswith("." + name)]
    close += difflib.get_close_matches(literal, known, 3, 0.6)
    tails = list(dict.fromkeys(name.rpartition(".")[2] for name in known))
    near = difflib.get_close_matches(literal.rpartition(".")[2], tails, 3, 0.6)
    alike = (name for name in known if name.rpartition(".")[2] in near)
    close += sorted(alike, key=lambda name: _distance(literal, name))
    close += [name for name in known if literal.lower() in name.lower()]
    return list(dict.fromkeys(close))


def _distance(a: str, b: str) -> float:
    return -difflib.SequenceMatcher(None, a, b).ratio()
