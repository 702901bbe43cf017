"""The curve of how many last blocks train, as bars of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from frostline.costing.cost import Cost
from frostline.reports.lines import Line, bullet, table_lines
from frostline.reports.table import Column, Table
from frostline.reports.units import Unit, bytes_text, bytes_unit, flops_text, flops_unit, percent, seconds_unit, share
from frostline.tracing.trace import Trace

_EIGHTHS = " ▏▎▍▌▋▊▉█"
MOST = 33  # lines of a plot; longer curves are thinned out, their ends kept


# What a narrow table leaves out, the least first.
_LEFT_OUT: tuple[set[str], ...] = (
    set(),
    {"of saved"},
    {"of saved", "saved"},
    {"of saved", "saved", "trains"},
    {"of saved", "saved", "trains", "bar of FLOPs"},
    {"of saved", "saved", "trains", "bar of FLOPs", "bar"},
)
_NARROWEST, _WIDEST = 8, 24  # columns of a bar


def sweep_lines(trace: Trace, points: Sequence[tuple[int, Cost]], width: int) -> Iterator[Line]:
    """One line a number of blocks; bars are shares of training everything: of the FLOPs and the peak, or of the time
    where it is known and the peak.
    """
    shown = _thinned(list(points))
    num_blocks = points[-1][0]
    full = points[0][1].full
    yield Line("")
    yield Line(f"the last K of {num_blocks} blocks of {type(trace.model).__name__}, with the head", "bold")
    yield from table_lines(_table(shown, full, num_blocks, width))
    (first, a), (last, b) = next((p for p in points if p[0]), points[0]), points[-1]
    if last > first:
        steps = last - first
        step, peak = (b.step_flops - a.step_flops) // steps, (b.peak_bytes - a.peak_bytes) // steps
        yield Line("")
        yield from bullet(
            f"one block more costs {flops_text(step)} ({share(step, full.step_flops)} of a full step) and "
            f"{bytes_text(peak)} of peak memory ({share(peak, full.peak_bytes)}), on average.",
            width,
        )


def _table(shown: Sequence[tuple[int, Cost]], full: Cost, num_blocks: int, width: int) -> Table:
    for out in _LEFT_OUT:
        least = _laid_out(shown, full, num_blocks, out, _NARROWEST)
        if least.width <= width:
            break
    num_bars = sum(not column.title and column.left for column in least.columns)
    room = _NARROWEST + (width - least.width) // max(num_bars, 1)
    return _laid_out(shown, full, num_blocks, out, max(_NARROWEST, min(_WIDEST, room)))


def _laid_out(shown: Sequence[tuple[int, Cost]], full: Cost, num_blocks: int, out: set[str], bar: int) -> Table:
    costs = [cost for _, cost in shown]
    seconds = [cost.step_seconds for cost in costs]
    columns = [("", Column("last", f"of {num_blocks}", tuple(str(k) if k else "head" for k, _ in shown)))]
    columns.append(("trains", Column("trains", "%", tuple(percent(c.num_trained, c.num_parameters, 2) for c in costs))))

    def amounts(title: str, unit: Unit, values: Sequence[float], whole: float, part: str = "") -> None:
        columns.append((part, Column(title, unit.name, tuple(map(unit, values)))))
        columns.append((f"of {part}" if part else "", Column("of all", "%", tuple(percent(v, whole) for v in values))))

    def bars(values: Sequence[float], whole: float, part: str) -> None:
        columns.append((part, Column("", "", tuple(_bar(v, whole, bar) for v in values), left=True)))

    flops = [c.step_flops for c in costs]
    amounts("step", flops_unit(flops), flops, full.step_flops)
    timed, whole = [value for value in seconds if value is not None], full.step_seconds
    if whole is not None and len(timed) == len(costs):
        amounts("time", seconds_unit(timed), timed, whole)
        bars(timed, whole, "bar of FLOPs")
    else:
        bars(flops, full.step_flops, "bar of FLOPs")
    saved = [c.saved_bytes for c in costs]
    amounts("saved", bytes_unit(saved), saved, full.saved_bytes, "saved")
    peaks = [c.peak_bytes for c in costs]
    amounts("peak", bytes_unit(peaks), peaks, full.peak_bytes)
    bars(peaks, full.peak_bytes, "bar")
    return Table(tuple(column for part, column in columns if part not in out))


def _thinned(points: list[tuple[int, Cost]]) -> list[tuple[int, Cost]]:
    if len(points) <= MOST:
        return points
    every = -(-len(points) // MOST)
    return [p for i, p in enumerate(points) if i % every == 0 or i == len(points) - 1]


def _bar(part: float, whole: float, width: int) -> str:
    """
    >>> _bar(1, 2, 8), _bar(9, 64, 8), _bar(0, 1, 8)
    ('████    ', '█▏      ', '        ')
    """
    eighths = round(8 * width * part / whole) if whole else 0
    full, rest = divmod(min(eighths, 8 * width), 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)
