"""A measurement: tables of what was predicted beside what was measured, and the same as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from frostline.costing.cost import Cost
from frostline.measuring.measured import Measured
from frostline.measuring.measurement import MeasuredRow, Measurement
from frostline.probing.page_faults import KEEPING
from frostline.reports.data import VERSION, cost_figures
from frostline.reports.findings import Finding, bound_findings
from frostline.reports.header import header
from frostline.reports.lines import WIDTH, Line, bullet, header_lines, plain, table_lines
from frostline.reports.table import Column, Table
from frostline.reports.units import Unit, bytes_unit, difference, flops_unit, percent, seconds_unit, share


def measurement_text(measurement: Measurement, width: int = WIDTH) -> str:
    return plain(measurement_lines(measurement, width))


def measurement_lines(measurement: Measurement, width: int = WIDTH) -> Iterator[Line]:
    """Header, seconds, bytes and FLOPs, then what was learnt and how far it can be trusted."""
    threads = f"{measurement.threads} thread{'s' if measurement.threads > 1 else ''}"
    facts = [*header(measurement.trace).lines()]
    facts.append(f"{threads}, {measurement.rounds} rounds, every row in a process of its own")
    yield from header_lines(facts, width)
    for table in _tables(measurement, width):
        yield Line("")
        yield from table_lines(table)
    yield Line("")
    for finding in measurement_findings(measurement):
        yield from bullet(finding.text, width, "yellow" if finding.kind in ("failed", "uncounted", "busy") else "")
    yield from bullet(
        f"measured: the median of the rounds, ± half the distance of their quartiles; "
        f"{measurement.full.predicted.optimizer}; error: predicted against measured; "
        "peak: all that is allocated, weights and inputs included; "
        "saved: held by autograd when the loss returns; a multiply-add is 2 FLOPs.",
        width,
        "dim",
    )


BUSY = 20
"""Interruptions a second from which on a machine is not at rest: a run alone on two cores has up to 7, one that shares
them with another process from 30 to 270."""
FAULTING = 0.03
"""Of a step, from where on its page faults are told."""

# -- tables -----------------------------------------------------------------------------------------------------------

Predicted = Callable[[Cost], float | None]
Actual = Callable[[Measured], float | None]


def _tables(measurement: Measurement, width: int) -> Iterator[Table]:
    rows = measurement.rows
    for title, groups in (
        ("a step", _seconds(measurement)),
        ("bytes", _bytes(rows)),
        ("FLOPs", _flops(rows)),
    ):
        yield from _fitting(Column(title, "", tuple(row.label for row in rows), left=True), groups, width)


def _fitting(labels: Column, groups: Sequence[list[Column]], width: int) -> Iterator[Table]:
    """As many groups of columns beside each other as fit, in as many tables as that takes."""
    table: Table | None = None
    for group in groups:
        wider = Table((*(table.columns if table else (labels,)), *group))
        if table is not None and wider.width > width:
            yield table
            wider = Table((labels, *group))
        table = wider
    if table is not None:
        yield table


def _seconds(measurement: Measurement) -> list[list[Column]]:
    rows, pace = measurement.rows, measurement.pace

    def as_it_ran(cost: Cost) -> float | None:
        return None if cost.step_seconds is None else cost.step_seconds * pace

    unit = seconds_unit([as_it_ran(row.predicted) for row in rows] + _actual(rows, lambda m: m.step_seconds))

    def column(title: str, figure: Actual) -> Column:
        return Column(title, unit.name, tuple(unit(value) for value in _actual(rows, figure)))

    def of_full(title: str, ratio: Callable[[MeasuredRow], float | None]) -> Column:
        shares = [ratio(row) for row in rows]
        return Column(title, "% of full", tuple("-" if share is None else percent(share, 1) for share in shares))

    predicted, measured, error = _beside(rows, "", unit, as_it_ran, lambda m: m.step_seconds)
    return [
        [predicted, measured, column("±", lambda m: m.spread_seconds), error],
        [of_full("predicted", measurement.predicted_ratio), of_full("measured", measurement.ratio)],
        [
            column("forward", lambda m: m.forward_seconds),
            column("backward", lambda m: m.backward_seconds),
            column("optimizer", lambda m: m.optimizer_seconds),
        ],
    ]


def _bytes(rows: Sequence[MeasuredRow]) -> list[list[Column]]:
    return [
        _bytes_beside(rows, "peak", lambda c: c.peak_bytes, lambda m: m.peak_bytes),
        _bytes_beside(rows, "saved", lambda c: c.saved_bytes, lambda m: m.saved_bytes),
    ]


def _flops(rows: Sequence[MeasuredRow]) -> list[list[Column]]:
    unit = flops_unit([flops for row in rows for flops in (row.predicted.forward_flops, row.predicted.backward_flops)])
    return [
        _beside(rows, "forward", unit, lambda c: c.forward_flops, lambda m: m.forward_flops),
        _beside(rows, "backward", unit, lambda c: c.backward_flops, lambda m: m.backward_flops),
    ]


def _bytes_beside(
    rows: Sequence[MeasuredRow], title: str, predicted: Callable[[Cost], int | None],
    actual: Callable[[Measured], int | None],
) -> list[Column]:  # fmt: skip
    values = [predicted(row.predicted) for row in rows]
    values += [None if row.measured is None else actual(row.measured) for row in rows]
    return _beside(rows, title, bytes_unit(values), predicted, actual)


def _beside(rows: Sequence[MeasuredRow], title: str, unit: Unit, predicted: Predicted, actual: Actual) -> list[Column]:
    """Three columns: predicted, measured, and how far they are apart."""
    said = [predicted(row.predicted) for row in rows]
    found = _actual(rows, actual)
    first = f"{title} predicted" if title else "predicted"
    return [
        Column(first, unit.name, tuple(unit(value) for value in said)),
        Column("measured", unit.name, tuple(unit(value) for value in found)),
        Column("error", "%", tuple(difference(p, m) for p, m in zip(said, found, strict=True))),
    ]


def _actual(rows: Sequence[MeasuredRow], figure: Actual) -> list[float | None]:
    return [None if row.measured is None else figure(row.measured) for row in rows]


# -- what was learnt --------------------------------------------------------------------------------------------------


def measurement_findings(measurement: Measurement) -> Iterator[Finding]:
    """The founding question's answer, how near train-only is to the lower bound, what failed, the noise, and notes."""
    by_subset: dict[Any, dict[str, MeasuredRow]] = {}
    for row in measurement.rows[:-1]:
        by_subset.setdefault(row.subset, {})[row.method] = row
    for methods in by_subset.values():
        yield from _answer(measurement, methods)
    yield from bound_findings([(row.label, row.predicted) for row in measurement.rows])
    for row in measurement.rows:
        if row.measured is None:
            yield Finding("failed", f"{row.label} could not be run: {row.error}")
    uncounted = sorted({op for row in measurement.rows if row.measured for op in row.measured.uncounted})
    if uncounted:
        yield Finding("uncounted", f"no FLOP formula, in no total: {', '.join(uncounted)}")
    full = measurement.full.measured
    if full is not None:
        own = share(full.spread_seconds, full.step_seconds)
        text = f"noise: half the distance of the quartiles of full training is {own}"
        if measurement.noise is not None:
            text += (
                f" of its median, and the medians of two processes that run it lie {share(measurement.noise, 1)} apart"
            )
        yield Finding("noise", f"{text}: what differs by less is not told apart.")
    interruptions = max((row.measured.interruptions for row in measurement.rows if row.measured), default=0)
    if interruptions > BUSY:
        advice = " Several threads wait for each other each time: --threads 1 suffers least." * (
            measurement.threads > 1
        )
        yield Finding(
            "busy",
            f"the machine was busy with something else: up to {interruptions:.0f} times a second it took a processor "
            f"from a run, so that the seconds are too long.{advice}",
        )
    if measurement.timed_at:
        yield Finding(
            "pace",
            f"while the rows ran, a reference kernel took {measurement.pace:.2f} times as long as when their ops were "
            "timed; predicted seconds are given for the machine as fast as the rows had it.",
        )
    yield from _faults(measurement)
    for note in measurement.notes:
        yield Finding("note", note)


def _faults(measurement: Measurement) -> Iterator[Finding]:
    """Memory that goes back to the system and is taken again at each step; the worst row."""
    ran = [(row.label, row.measured) for row in measurement.rows if row.measured]
    if not ran:
        return
    label, worst = max(ran, key=lambda row: row[1].fault_seconds / row[1].step_seconds)
    if worst.fault_seconds > FAULTING * worst.step_seconds:
        yield Finding(
            "page-faults",
            f"page faults: up to {share(worst.fault_seconds, worst.step_seconds)} of a step ({label}: "
            f"{worst.page_faults:,.0f}, about {1e3 * worst.fault_seconds:.1f} ms). The C library gives memory back to "
            "the system and takes it again at each step, how much varies from step to step, and predictions hold only "
            f"that of the largest blocks. Started with {KEEPING}, glibc keeps it.",
        )


def _answer(measurement: Measurement, methods: dict[str, MeasuredRow]) -> Iterator[Finding]:
    """What the optimizer's not owning the rest saves, and what freezing the rest does."""
    told = []
    for method in ("optimizer-only", "freeze"):
        row = methods.get(method)
        ratio = measurement.ratio(row) if row is not None else None
        if row is None or ratio is None:
            return
        told.append((row, ratio))
    (left, slow), (frozen, fast) = told
    name = left.label.removesuffix(f" by {left.method}")
    text = (
        f"{name}: leaving the rest out of the optimizer takes {share(slow, 1)} of full training's time, "
        f"freezing it {share(fast, 1)}"
    )
    peaks = [row.measured.peak_bytes if row.measured else None for row in (left, frozen, measurement.full)]
    if None not in peaks:
        low, lower, whole = (peak or 0 for peak in peaks)
        text += f"; of its peak memory {share(low, whole)} and {share(lower, whole)}"
    yield Finding("answer", f"{text}.")


# -- data -------------------------------------------------------------------------------------------------------------


def measurement_to_dict(measurement: Measurement) -> dict[str, Any]:
    """Every figure; see ``schema.json``."""
    from frostline import __version__

    return {
        "version": VERSION,
        "kind": "measurement",
        "frostline": __version__,
        "model": header(measurement.trace).to_dict(),
        "threads": measurement.threads,
        "rounds": measurement.rounds,
        "rows": [_row(measurement, row) for row in measurement.rows],
        "again": None if measurement.again is None else measurement.again.to_dict(),
        "noise": measurement.noise,
        "pace": measurement.pace,
        "findings": [asdict(finding) for finding in measurement_findings(measurement)],
    }


def _row(measurement: Measurement, row: MeasuredRow) -> dict[str, Any]:
    return {
        "label": row.label,
        "predicted": cost_figures(row.predicted),
        "predicted_ratio": measurement.predicted_ratio(row),
        "measured": None if row.measured is None else row.measured.to_dict(),
        "measured_ratio": measurement.ratio(row),
        "error": row.error,
    }
