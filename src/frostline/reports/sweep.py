"""The curve of how many last blocks train, as bars of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from frostline.costing.cost import Cost
from frostline.reports.table import Column, Table
from frostline.reports.text import Line, bullet, table_lines
from frostline.reports.units import bytes_text, bytes_unit, flops_text, flops_unit, percent, share
from frostline.tracing.trace import Trace

_EIGHTHS = " ▏▎▍▌▋▊▉█"
MOST = 33  # lines of a plot; longer curves are thinned out, their ends kept


def sweep_lines(trace: Trace, points: Sequence[tuple[int, Cost]], width: int) -> Iterator[Line]:
    """One line a number of blocks; bars are shares of training everything."""
    shown = _thinned(list(points))
    costs = [cost for _, cost in shown]
    full = costs[0].full
    flops = flops_unit([c.step_flops for c in costs])
    kept = bytes_unit([c.saved_bytes for c in costs])
    num_blocks = points[-1][0]
    bars = max(8, min(24, (width - 56) // 2))
    table = Table(
        (
            Column("last", f"of {num_blocks}", tuple(str(k) if k else "head" for k, _ in shown)),
            Column("trains", "%", tuple(percent(c.num_trained, c.num_parameters, 2) for c in costs)),
            Column("step", flops.name, tuple(flops(c.step_flops) for c in costs)),
            Column("of all", "%", tuple(percent(c.step_flops, full.step_flops) for c in costs)),
            Column("", "", tuple(_bar(c.step_flops, full.step_flops, bars) for c in costs), left=True),
            Column("saved", kept.name, tuple(kept(c.saved_bytes) for c in costs)),
            Column("of all", "%", tuple(percent(c.saved_bytes, full.saved_bytes) for c in costs)),
            Column("", "", tuple(_bar(c.saved_bytes, full.saved_bytes, bars) for c in costs), left=True),
        )
    )
    yield Line("")
    yield Line(f"the last K of {num_blocks} blocks of {type(trace.model).__name__}, with the head", "bold")
    yield from table_lines(table)
    (first, a), (last, b) = next((p for p in points if p[0]), points[0]), points[-1]
    if last > first:
        steps = last - first
        step, saved = (b.step_flops - a.step_flops) // steps, (b.saved_bytes - a.saved_bytes) // steps
        yield Line("")
        yield from bullet(
            f"one block more costs {flops_text(step)} ({share(step, full.step_flops)} of a full step) and "
            f"{bytes_text(saved)} of saved bytes ({share(saved, full.saved_bytes)}), on average.",
            width,
        )


def _thinned(points: list[tuple[int, Cost]]) -> list[tuple[int, Cost]]:
    if len(points) <= MOST:
        return points
    every = -(-len(points) // MOST)
    return [p for i, p in enumerate(points) if i % every == 0 or i == len(points) - 1]


def _bar(part: int, whole: int, width: int) -> str:
    """
    >>> _bar(1, 2, 8), _bar(9, 64, 8), _bar(0, 1, 8)
    ('████    ', '█▏      ', '        ')
    """
    eighths = round(8 * width * part / whole) if whole else 0
    full, rest = divmod(min(eighths, 8 * width), 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)
