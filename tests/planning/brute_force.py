"""Every subset of a small model, costed one by one by `trace.cost`: what plans are held to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import frostline as fl

EXACT = ("step_flops", "backward_flops", "saved_bytes", "optimizer_bytes", "trainable_parameters")


@dataclass(frozen=True)
class Tried:
    """One subset: its figures, and what it is worth (0 for what gets no gradient)."""

    names: tuple[str, ...]
    figures: Mapping[str, float]
    worth: float


def every_subset(
    trace: fl.Trace, importance: Mapping[str, float], method: str = "freeze", figures: Iterable[str] = EXACT,
    groups: Sequence[Sequence[str]] | None = None,
) -> list[Tried]:  # fmt: skip
    """All subsets of which something gets a gradient and that torch does not refuse."""
    parts = [[name] for name in trace.parameters] if groups is None else groups
    found = []
    for count in range(1, len(parts) + 1):
        for chosen in combinations(parts, count):
            names = [name for part in chosen for name in part]
            try:
                cost = trace.cost(names, method=method)
            except fl.FrostlineError:
                continue
            worth = math.fsum(importance[name] for name in names if name not in cost.unreached)
            if any(name in cost.unreached for name in names):
                continue  # a plan names nothing that gets no gradient
            spent = {f: cost.num_trained if f == "trainable_parameters" else getattr(cost, f) for f in figures}
            found.append(Tried(tuple(names), spent, worth))
    return found


def best_within(tried: Sequence[Tried], limits: Mapping[str, float]) -> Tried | None:
    """The subset worth most within the limits; None if there is none."""
    allowed = [t for t in tried if all(t.figures[figure] <= limit for figure, limit in limits.items())]
    return max(allowed, key=lambda t: t.worth, default=None)
