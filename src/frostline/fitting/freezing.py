"""What freezing one thing more would buy: each block or module of a subset, left out in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from frostline.costing.cost import Cost
from frostline.errors import FrostlineError
from frostline.subsets import Subset, blocks


@dataclass(frozen=True)
class Freezing:
    """One thing more frozen.

    Attributes:
        what: a module, all of whose trained parameters are frozen too.
        num_elements: how many numbers that takes away.
        peak_bytes: at the size found.
        size: what would fit then, drawn on as a straight line; None where the memory is not what ends it.
    """

    what: str
    num_elements: int
    peak_bytes: int
    size: int | None


def parts_of(subset: Subset, model_blocks: list[str]) -> Iterator[tuple[str, Subset]]:
    """The subset without each of its parts: the model's repeated blocks, and the outermost modules beside them."""
    groups: dict[str, list[str]] = {}
    for name in subset.names:
        groups.setdefault(_part(name, model_blocks), []).append(name)
    if len(groups) == 1:  # all in one: its children
        groups = {name.rpartition(".")[0] or name: [] for name in subset.names}
        for name in subset.names:
            groups[name.rpartition(".")[0] or name].append(name)
    if len(groups) < 2:
        return
    for part, names in groups.items():
        kept = tuple(name for name in subset.names if name not in names)
        slices = {name: parts for name, parts in subset.slices.items() if name in kept}
        yield part, Subset(kept, slices, shapes=subset.shapes)


def _part(name: str, model_blocks: list[str]) -> str:
    """The block a parameter lies in, or else the outermost module around it that holds no block."""
    within = next((block for block in model_blocks if name.startswith(f"{block}.")), None)
    if within is not None:
        return within
    parts = name.split(".")
    for depth in range(1, len(parts)):
        prefix = ".".join(parts[:depth])
        if not any(block.startswith(f"{prefix}.") for block in model_blocks):
            return prefix
    return name


def freezings(
    cost: Cost, costs_at: Callable[[Subset], list[tuple[int, Cost]]], limit: int, size: int, bounded: bool
) -> tuple[Freezing, ...]:
    """Each part frozen too, the most bought first.

    Args:
        cost: at the size found.
        costs_at: a subset -> ``(size, cost)`` at the size found, and at another, if there is one.
        limit: bytes.
        size: the size found.
        bounded: that more memory would not help.
    """
    found: list[Freezing] = []
    for what, subset in parts_of(cost.subset, blocks(cost.trace.model)):
        try:
            points = [(n, other.peak_bytes) for n, other in costs_at(subset)]
        except FrostlineError:  # what is left is not reached by the loss
            continue
        saved = cost.subset.num_parameters() - subset.num_parameters()
        found.append(Freezing(what, saved, points[0][1], None if bounded else _drawn_on(points, limit)))
    found.sort(key=lambda f: (-(f.size or 0), f.peak_bytes))
    least = cost.peak_bytes - cost.peak_bytes // 1000  # of the peak, what is worth a line
    return tuple(f for f in found if (f.size or 0) > size or ((bounded or not size) and f.peak_bytes < least))


def _drawn_on(points: list[tuple[int, int]], limit: int) -> int | None:
    """Where the line through two points reaches the limit."""
    if len(points) < 2:
        return None
    (n, p), (m, q) = points[:2]
    slope = (q - p) / (m - n)
    return None if slope <= 0 else max(0, int(n + (limit - p) / slope))
