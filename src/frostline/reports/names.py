"""Many parameter names in few words: whole modules by their name, runs of numbered modules as one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def collapsed(chosen: Iterable[str], every: Sequence[str]) -> list[str]:
    """The largest modules all of whose parameters are chosen, and single parameters for the rest, in order.

    Args:
        chosen: names out of ``every``.
        every: all parameters that could be chosen, in the order of the model.

    >>> names = ["a.0.w", "a.0.b", "a.1.w", "a.1.b", "head.w"]
    >>> collapsed(["a.0.w", "a.0.b", "a.1.w", "a.1.b"], names)
    ['a']
    >>> collapsed(["a.0.b", "a.1.w", "a.1.b", "head.w"], names)
    ['a.0.b', 'a.1', 'head.w']
    """
    wanted = set(chosen)
    total: dict[str, int] = {}
    inside: dict[str, int] = {}
    for name in every:
        for prefix in _prefixes(name):
            total[prefix] = total.get(prefix, 0) + 1
            if name in wanted:
                inside[prefix] = inside.get(prefix, 0) + 1
    found: dict[str, None] = {}
    for name in every:
        if name in wanted:
            whole = (p for p in _prefixes(name) if total[p] > 1 and inside.get(p) == total[p])
            found.setdefault(next(whole, name))
    return list(found)


def summary(chosen: Sequence[str], every: Sequence[str], limit: int = 3) -> str:
    """What is chosen, in a few words.

    >>> names = [f"layer.{i}.{k}" for i in range(4) for k in ("weight", "bias")] + ["head.weight"]
    >>> summary(names, names)
    'everything'
    >>> summary(names[2:], names)
    'layer.1-3, head.weight'
    >>> summary([n for n in names if n.endswith("bias")], names)
    'layer.0-3.bias'
    >>> summary(["layer.0.bias", "layer.1.weight", "layer.2.bias", "head.weight"], names)
    '4 tensors'
    """
    if set(chosen) >= set(every):
        return "everything"
    runs = _runs(collapsed(chosen, every))
    if len(runs) <= limit and (len(runs) == 1 or len(", ".join(runs)) <= 72):
        return ", ".join(runs)
    return f"{len(chosen)} tensors"


def _prefixes(name: str) -> list[str]:
    """The modules around a parameter, outermost first."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _runs(names: list[str]) -> list[str]:
    """Join names that differ only in one number that counts up: ``layer.1, layer.2`` are ``layer.1-2``."""
    groups: dict[tuple[str, str], list[int]] = {}
    order: list[tuple[str, str] | str] = []
    for name in names:
        match = re.fullmatch(r"((?:.*\.)?)(\d+)((?:\..*)?)", name)
        if match is None:
            order.append(name)
            continue
        key = (match[1], match[3])
        if key in groups and groups[key][-1] + 1 == int(match[2]):
            groups[key].append(int(match[2]))
        elif key in groups:
            order.append(name)
        else:
            groups[key] = [int(match[2])]
            order.append(key)
    spelled = []
    for item in order:
        if isinstance(item, str):
            spelled.append(item)
            continue
        numbers = groups[item]
        span = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"
        spelled.append(f"{item[0]}{span}{item[1]}")
    return spelled
