"""What fits: the largest batch and length of each row, what holds the peak, and what freezing more would buy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from frostline.fitting.axes import Axis
from frostline.fitting.result import Fit, FitRow, Largest
from frostline.reports.data import VERSION, cost_figures
from frostline.reports.findings import trained_words
from frostline.reports.header import header
from frostline.reports.lines import WIDTH, Line, bullet, header_lines, plain, table_lines
from frostline.reports.peaks import moment_to_dict, peak_lines
from frostline.reports.table import Column, Table, basis_word, shortened
from frostline.reports.units import bytes_text, bytes_unit, percent

MOST_FREEZINGS = 3  # printed; the data has all


def fit_text(fit: Fit, width: int = WIDTH) -> str:
    return plain(fit_lines(fit, width))


def fit_lines(fit: Fit, width: int = WIDTH) -> Iterator[Line]:
    """Header and what was resized; the table; what holds each peak; what more could be frozen; notes."""
    yield from header_lines(header(fit.trace).lines(), width)
    yield from header_lines(
        [f"{bytes_text(fit.memory_bytes)} of memory, {fit.num_traces} sizes traced, none run"], width
    )
    for table in _tables(fit, width):
        yield Line("")
        yield from table_lines(table)
    for kind, parts in _by_kind(fit):
        title = f"at the largest {kind}" if all(part.size for _, part in parts) else f"at the peak, {kind}"
        yield from peak_lines(title, [(row.label, part.peak) for row, part in parts], width)
    for kind, parts in _by_kind(fit):
        bought = [(row, part) for row, part in parts if part.freezing]
        if bought:
            yield Line("")
            yield from table_lines(_freezing_table(kind, bought, width))
    yield Line("")
    for text in _sentences(fit):
        yield from bullet(text, width)
    yield from bullet(_legend(fit), width, "dim")


def _parts(fit: Fit) -> Iterator[tuple[FitRow, Largest]]:
    """Rows and what was found along each axis, the batch of every row first."""
    for row in fit.rows:
        yield row, row.batch
    for row in fit.rows:
        if row.length is not None:
            yield row, row.length


def _by_kind(fit: Fit) -> Iterator[tuple[str, list[tuple[FitRow, Largest]]]]:
    for kind in ("batch", "length"):
        parts = [(row, part) for row, part in _parts(fit) if part.kind == kind]
        if parts:
            yield kind, parts


def _tables(fit: Fit, width: int) -> Iterator[Table]:
    """One table, or one for each axis where the lines would be too long."""
    rows = fit.rows
    unit = bytes_unit([fit.memory_bytes, *(part.peak_bytes for _, part in _parts(fit))])
    costs = [row.batch.cost for row in rows]
    basis = basis_word(costs, "peak_bytes")
    labels = (
        Column("", "", tuple(row.label for row in rows), "basis", left=True),
        Column("trains", "%", tuple(percent(c.num_trained, c.num_parameters, 2) for c in costs)),
    )

    def columns(kind: str, other: Axis | None, found: Sequence[Largest]) -> tuple[Column, ...]:
        beside = "" if other is None else f"at {other.kind} {other.size:,}"
        sizes = tuple(f"{part.size:,}" if part.size else "none" for part in found)
        return (
            Column(f"largest {kind}", beside, sizes, basis),
            Column("peak", unit.name, tuple(unit(part.peak_bytes) for part in found), basis),
            Column("of memory", "%", tuple(percent(part.peak_bytes, fit.memory_bytes) for part in found)),
        )

    batch = columns("batch", fit.length, [row.batch for row in rows])
    if fit.length is None:
        yield Table((*labels, *batch))
        return
    length = columns("length", fit.batch, [row.length for row in rows if row.length is not None])
    both = Table((*labels, *batch, *length))
    if both.width <= width:
        yield both
        return
    yield Table((*labels, *batch))
    yield Table((*labels, *length))


def _freezing_table(kind: str, bought: Sequence[tuple[FitRow, Largest]], width: int) -> Table:
    chosen = [(row, part, f) for row, part in bought for f in part.freezing[:MOST_FREEZINGS]]
    unit = bytes_unit([f.peak_bytes for _, _, f in chosen])
    labels = tuple(row.label if f is part.freezing[0] else "" for row, part, f in chosen)

    def table(room: int) -> Table:
        return Table(
            (
                Column("freezing", "", labels, "basis", left=True),
                Column("one thing more", "", tuple(shortened(f.what, room) for _, _, f in chosen), left=True),
                Column("numbers", "", tuple(f"{f.num_elements:,}" for _, _, f in chosen), "exact"),
                Column("peak", unit.name, tuple(unit(f.peak_bytes) for _, _, f in chosen), "predicted"),
                Column(f"largest {kind}", "", tuple(_estimate(f.size) for _, _, f in chosen), "estimated"),
            )
        )

    whole = table(1000)
    over = whole.width - width
    return whole if over <= 0 else table(max(16, whole.columns[1].width - over))


def _estimate(size: int | None) -> str:
    return "-" if size is None else f"~{size:,}" if size else "none"


def _sentences(fit: Fit) -> Iterator[str]:
    yield f"the batch is {fit.batch}."
    if fit.length is not None:
        yield f"the sequence length is {fit.length}."
    for row, part in _parts(fit):
        called = f"{row.label} ({trained_words(part.cost)})"
        if not part.size:
            least = f"{part.kind} {part.at:,} needs {bytes_text(part.peak_bytes)}"
            more = f"; {part.bound}" if part.bound else ""
            yield f"{called} does not fit: {least}{more}."
        elif part.bound:
            yield f"{row.label}: the memory does not end the {part.kind}: {part.bound}."
    for note in fit.notes:
        yield f"note: {note}."


def _legend(fit: Fit) -> str:
    methods = dict.fromkeys(row.method for row in fit.rows)
    by = f"by {next(iter(methods))}; " if len(methods) == 1 else ""
    scratch = (
        "scratch inside kernels was measured op by op"
        if fit.scratch
        else "scratch inside kernels is not in it (--scratch measures it)"
    )
    return (
        f"{by}{fit.rows[0].batch.cost.optimizer} state; peak: all that is allocated, weights and inputs included; "
        f"{scratch}, nor is what a CUDA context and the allocator's unused blocks take; "
        "estimated: a straight line through two traced sizes, for one thing more frozen at the size found."
    )


# -- data -------------------------------------------------------------------------------------------------------------


def fit_to_dict(fit: Fit) -> dict[str, Any]:
    """Every figure; see ``schema.json``."""
    from frostline import __version__

    return {
        "version": VERSION,
        "kind": "fit",
        "frostline": __version__,
        "model": header(fit.trace).to_dict(),
        "memory_bytes": fit.memory_bytes,
        "scratch": fit.scratch,
        "batch": _axis(fit.batch),
        "length": None if fit.length is None else _axis(fit.length),
        "num_traces": fit.num_traces,
        "rows": [
            {
                "label": row.label,
                "batch": _largest(row.batch),
                "length": None if row.length is None else _largest(row.length),
            }
            for row in fit.rows
        ],
        "notes": list(fit.notes),
    }


def _axis(axis: Axis) -> dict[str, Any]:
    return {
        "size": axis.size,
        "dimensions": {name: list(dims) for name, dims in axis.places.items()},
        "given": axis.given,
    }


def _largest(part: Largest) -> dict[str, Any]:
    return {
        "size": part.size,
        "cost_size": part.at,
        "peak_bytes": part.peak_bytes,
        "peak": moment_to_dict(part.peak),
        "next_bytes": part.next_bytes,
        "bound": part.bound,
        "freezing": [asdict(freezing) for freezing in part.freezing],
        "cost": cost_figures(part.cost),
    }
