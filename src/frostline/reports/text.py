"""Reports for a terminal: one cost, several side by side, breakdowns, and what each parameter more or less does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from frostline.costing.breakdown import Row
from frostline.costing.comparison import Comparison
from frostline.costing.cost import Cost
from frostline.costing.marginal import Change, Marginal
from frostline.reports.findings import early_words, findings, reach, trained_words
from frostline.reports.header import header
from frostline.reports.lines import WIDTH, Line, bullet, header_lines, plain, table_lines, wrapped
from frostline.reports.peaks import peak_lines
from frostline.reports.table import EVERYTHING, GAP, Column, Table, cost_table, row_table, shortened
from frostline.reports.units import bytes_unit, flops_unit, percent, share, total

if TYPE_CHECKING:
    from rich.console import Console


def show(lines: Iterable[Line], console: Console) -> None:
    """Print to a terminal in colour, to anything else without."""
    from rich.text import Text

    for line in lines:
        console.print(Text(line.text, style=line.style), soft_wrap=True)


# -- one cost ---------------------------------------------------------------------------------------------------------


def cost_line(cost: Cost) -> str:
    """What a subset costs, in one line: the honest ``print_trainable_parameters()``."""
    full = cost.full
    state = total(cost.optimizer_bytes, full.optimizer_bytes) is not None
    kept = [c.gradient_bytes + (c.optimizer_bytes or 0 if state else 0) for c in (cost, full)]
    parts = [
        f"trainable {share(cost.num_trained, cost.num_parameters)} of parameters",
        f"{share(cost.step_flops, full.step_flops)} of a full step's FLOPs",
        f"{share(cost.saved_bytes, full.saved_bytes)} of its saved bytes",
        f"{share(*kept)} of its gradients{' and optimizer state' if state else ''}",
    ]
    words = dict.fromkeys(cost.basis[f].partition(":")[0] for f in ("step_flops", "saved_bytes", "gradient_bytes"))
    parts.append(" and ".join(words) + (f", but for {len(cost.uncounted)} uncounted ops" if cost.uncounted else ""))
    shares = [f"{share(cost.peak_bytes, full.peak_bytes)} of its peak memory"]
    if cost.step_seconds is not None and full.step_seconds:
        shares.insert(0, f"{share(cost.step_seconds, full.step_seconds)} of its time")
    parts += [*shares, cost.basis["peak_bytes"].partition(":")[0]]
    return " | ".join(parts)


# -- several costs ----------------------------------------------------------------------------------------------------


def comparison_text(comparison: Comparison, width: int = WIDTH) -> str:
    return plain(comparison_lines(comparison, width))


def comparison_lines(
    comparison: Comparison, width: int = WIDTH, label_title: str = "", *, at_peak: bool = False
) -> Iterator[Line]:
    """Header, table, what trains in each row and how far backward reaches, then what was learnt.

    ``at_peak``: with what is in memory at each row's fullest moment.
    """
    rows = with_everything(comparison.rows)
    costs = [cost for _, cost in rows]
    for trace in comparison.traces:
        yield from header_lines(header(trace).lines(), width)
    yield Line("")
    optimizers = dict.fromkeys(cost.optimizer for cost in costs)
    table = cost_table([label for label, _ in rows], costs, width, label_title)
    yield from table_lines(table)
    yield Line("")
    yield from _reach_lines(rows, width)
    if at_peak:
        yield from peak_lines("at the peak", [(label, cost.peak) for label, cost in rows], width)
    yield Line("")
    for finding in findings(comparison.rows):
        yield from bullet(finding.text, width, "yellow" if finding.kind in ("uncounted", "unreached") else "")
    yield from bullet(_legend(optimizers, costs), width, "dim")


def with_everything(rows: Sequence[tuple[str, Cost]]) -> list[tuple[str, Cost]]:
    """The rows, and what their shares are shares of where it is one model and not among them."""
    full = rows[0][1].full
    one_model = len({id(cost.trace) for _, cost in rows}) == 1
    there = any(cost.subset == full.subset and cost.method == full.method for _, cost in rows)
    return [*rows, (EVERYTHING, full)] if one_model and not there else list(rows)


def _legend(optimizers: Iterable[str], costs: Sequence[Cost]) -> str:
    methods = dict.fromkeys(cost.method for cost in costs)
    by = f"by {next(iter(methods))}; " if len(methods) == 1 else ""
    timed = all(cost.trace.calibration is not None for cost in costs)
    scratch = "kernels' scratch memory included" if timed else "without kernels' scratch memory (--time measures it)"
    return (
        f"{by}{' and '.join(optimizers)} state; a multiply-add is 2 FLOPs; "
        "saved: held by autograd when the loss returns; peak: all that is allocated at the fullest moment, weights and "
        f"inputs included, {scratch}."
    )


def _reach_lines(rows: Sequence[tuple[str, Cost]], width: int) -> Iterator[Line]:
    """What trains in each row, and how far backward reaches because of which parameter."""
    groups: dict[tuple[int, str, str], list[str]] = {}
    for label, cost in rows:
        if label != EVERYTHING:
            groups.setdefault((id(cost.trace), trained_words(cost), reach(cost)), []).append(label)
    labels = [", ".join(names) for names in groups.values()]
    told = [(what, far) for _, what, far in groups]
    first = max(map(len, labels))
    last = max(len(far) for _, far in told)
    room = min(width - first - last - 2 * len(GAP), max(len(what) for what, _ in told))
    if room < max(len(word) for what, _ in told for word in what.split()):
        for label, (what, far) in zip(labels, told, strict=True):
            indent = " " * min(first + len(GAP), 16)
            text = f"{label.ljust(first)}{GAP}{what}; backward reaches {far}"
            yield from (Line(part) for part in wrapped(text, width, indent))
        return
    room = max(room, len("trains"))
    yield Line(f"{'':{first}}{GAP}{'trains':{room}}{GAP}backward reaches", "bold")
    for label, (what, far) in zip(labels, told, strict=True):
        for number, part in enumerate(wrapped(what, room, "")):
            label, far = (label, far) if number == 0 else ("", "")
            yield Line(f"{label:{first}}{GAP}{part:{room}}{GAP}{far}".rstrip())


# -- breakdowns -------------------------------------------------------------------------------------------------------


def breakdown_lines(
    rows: Sequence[Row], cost: Cost, what: str, label: str, width: int, limit: int = 40
) -> Iterator[Line]:
    """Rows of one cost, alike neighbours folded together, with their total."""
    folded = _limited(_without_idle(list(_folded(rows))), limit)
    yield Line("")
    yield from table_lines(row_table(folded, cost, width, f"{label} by {what}"), total=True)


def _folded(rows: Sequence[Row]) -> Iterator[Row]:
    """Neighbours that differ only in a number that counts up, and cost the same, as one row of their sum."""
    run: list[Row] = []
    for row in rows:
        if run and not _continues(run[-1], row):
            yield _sum_of(run)
            run = []
        run.append(row)
    if run:
        yield _sum_of(run)


def _continues(last: Row, row: Row) -> bool:
    a, b = last.name.split("."), row.name.split(".")
    if len(a) != len(b):
        return False
    changed = [(x, y) for x, y in zip(a, b, strict=True) if x != y]
    counts_up = (
        len(changed) == 1 and all(x.isdigit() for x in changed[0]) and int(changed[0][0]) + 1 == int(changed[0][1])
    )
    same = [getattr(last, amount) == getattr(row, amount) for amount in _SHOWN]
    return counts_up and all(same)


def _sum_of(run: list[Row]) -> Row:
    if len(run) == 1:
        return run[0]
    first, last = run[0].name.split("."), run[-1].name.split(".")
    name = ".".join(x if x == y else f"{x}-{y}" for x, y in zip(first, last, strict=True))
    return sum(run[1:], Row(f"{name} ({len(run)} alike)") + run[0])


_SHOWN = ("forward_flops", "grad_input_flops", "grad_weight_flops", "recompute_flops", "saved_bytes", "gradient_bytes",
          "optimizer_bytes")  # fmt: skip


def _without_idle(rows: list[Row]) -> list[Row]:
    """Rows that cost nothing, as one."""
    idle = [row for row in rows if not any(getattr(row, amount) for amount in _SHOWN)]
    if len(idle) < 2:
        return rows
    return [*(row for row in rows if row not in idle), sum(idle[1:], Row(f"({len(idle)} rows that cost nothing)"))]


def _limited(rows: list[Row], limit: int) -> list[Row]:
    """At most ``limit`` rows: the cheapest ones become one row, so that the rows still add up."""
    if len(rows) <= limit:
        return rows
    dearest = sorted(range(len(rows)), key=lambda i: (-rows[i].step_flops, -rows[i].saved_bytes))
    kept = set(dearest[: limit - 1])
    rest = [row for i, row in enumerate(rows) if i not in kept]
    return [*(row for i, row in enumerate(rows) if i in kept), sum(rest[1:], Row(f"({len(rest)} more rows)") + rest[0])]


# -- marginal ---------------------------------------------------------------------------------------------------------


def marginal_text(marginal: Marginal, width: int = WIDTH) -> str:
    return plain(marginal_lines(marginal, width))


def marginal_lines(marginal: Marginal, width: int = WIDTH, label: str = "", limit: int = 6) -> Iterator[Line]:
    """What dropping would save, the most first; what adding would cost, the least first; the few early ones."""
    cost = marginal.cost
    label = label or str(cost.subset)
    dropping = sorted(_alike(marginal.dropping), key=lambda c: (-c.step_flops, -c.saved_bytes, -c.num_elements))
    adding = sorted(_alike(marginal.adding), key=lambda c: (c.step_flops, c.saved_bytes, -c.num_elements))
    if dropping:
        yield from _changes(f"freezing, from {label}, saves", dropping[:limit], len(dropping), cost, width)
    if adding:
        yield from _changes(f"training beside {label} adds", adding[:limit], len(adding), cost, width)
    yield Line("")
    free = [c for c in marginal.adding if c.step_flops == 0]
    if free:
        numbers = sum(c.num_elements for c in free)
        yield from bullet(
            f"{len(free)} of {len(marginal.adding)} frozen parameters, {numbers:,} numbers, would each add no FLOPs.",
            width,
        )
    if len(adding) > limit and adding[-1].step_flops:
        most = adding[-1]
        more = f"{share(most.step_flops, cost.step_flops)} to the step"
        yield from bullet(f"the dearest to train beside {label} is {most.name}: it would add {more}.", width)
    if marginal.early is not None:
        yield from bullet(early_words(cost, marginal.early), width)
    else:
        yield from bullet(f"no few early parameters of {label} cause much of its backward.", width)


def _changes(title: str, chosen: Sequence[Change], num: int, cost: Cost, width: int) -> Iterator[Line]:
    flops = flops_unit([c.step_flops for c in chosen])
    kept = bytes_unit([max(c.saved_bytes, c.gradient_bytes + (c.optimizer_bytes or 0)) for c in chosen])

    def table(room: int) -> Table:
        return Table(
            (
                Column(title, "", tuple(shortened(c.name, room) for c in chosen), left=True),
                Column("numbers", "", tuple(f"{c.num_elements:,}" for c in chosen)),
                Column("step", flops.name, tuple(flops(c.step_flops) for c in chosen)),
                Column("of step", "%", tuple(percent(c.step_flops, cost.step_flops) for c in chosen)),
                Column("saved", kept.name, tuple(kept(c.saved_bytes) for c in chosen)),
                Column("grads+opt", kept.name, tuple(kept(total(c.gradient_bytes, c.optimizer_bytes)) for c in chosen)),
            )
        )

    whole = table(1000)
    over = whole.width - width
    yield Line("")
    yield from table_lines(whole if over <= 0 else table(max(20, whole.columns[0].width - over)))
    if num > len(chosen):
        yield Line(f"... and {num - len(chosen)} more", "dim")


def _alike(changes: Sequence[Change]) -> list[Change]:
    """Changes of the same amounts whose names differ only in numbers, as one that says how many there are."""
    groups: dict[Any, list[Change]] = {}
    for c in changes:
        amounts = (c.num_elements, c.step_flops, c.saved_bytes, c.gradient_bytes, c.optimizer_bytes)
        groups.setdefault((re.sub(r"\d+", "#", c.name), amounts), []).append(c)
    found = []
    for group in groups.values():
        name = group[0].name if len(group) == 1 else f"{group[0].name} (and {len(group) - 1} alike)"
        found.append(replace(group[0], names=(name,)))
    return found
