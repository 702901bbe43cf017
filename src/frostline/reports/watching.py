"""What was seen of a training script, as text and as data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from frostline.reports.lines import WIDTH, Line, bullet, header_lines, plain, table_lines, wrapped
from frostline.reports.table import Column, Table
from frostline.reports.units import bytes_text, flops_text, percent, seconds_text, share
from frostline.watching.finding import Figures, Finding, Level
from frostline.watching.values import ValueFact
from frostline.watching.watch import Watch

_STYLES = {Level.WRONG: "bold red", Level.WASTE: "bold yellow", Level.INFO: "bold"}
FAULTS_SAID = 0.02
"""Of a step's predicted time: what page faults take is worth a word from here on."""


def watch_text(watch: Watch, width: int = WIDTH) -> str:
    return plain(watch_lines(watch, width))


def watch_lines(watch: Watch, width: int = WIDTH) -> Iterator[Line]:
    """A verdict, the findings, who trains, and the step as it is beside the step with the fixes."""
    if watch.open:
        yield Line(f"{watch.record.name}: being watched")
        return
    yield from header_lines(_head(watch), width)
    for finding in watch.findings:
        yield Line("")
        yield from _finding_lines(finding, width)
    if watch.record.models:
        yield Line("")
        yield from table_lines(_who_trains(watch))
        yield Line("")
    if watch.values:
        yield from table_lines(_values(watch))
        yield Line("")
    if watch.first_nonfinite is not None:
        yield from bullet(_nonfinite(watch.first_nonfinite), width, "bold red")
    for text in (*_step(watch), *_faults(watch)):
        yield from bullet(text, width)
    for note in watch.notes:
        yield from bullet(f"{note}.", width, "dim")


def _head(watch: Watch) -> Iterator[str]:
    record = watch.record
    found = Counter(finding.level for finding in watch.findings)
    listed = ", ".join(f"{found[level]} {level}" for level in Level if found[level])
    verdict = f"{_count(len(watch.findings), 'finding')} ({listed})" if watch.findings else "nothing found"
    yield f"watched {record.name}: {verdict}"
    if not record.num_passes and not record.num_steps:
        yield "nothing was trained: no backward and no optimizer step was seen"
        return
    facts = [f"{_count(record.num_steps, 'optimizer step')}, {_count(record.num_passes, 'backward pass', 'es')}"]
    if not record.num_steps:
        facts.append("no step of a torch optimizer was seen, so nothing can be said of who uses the gradients")
    models = [
        f"{model.kind}{f' {model.variable}' if model.variable else ''}, "
        f"{sum(fact.numel for fact in model.parameters.values()):,} parameters"
        for model in record.models
    ]
    yield "; ".join([*facts, *models])


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{plural if number != 1 else ''}"


def _finding_lines(finding: Finding, width: int) -> Iterator[Line]:
    place = f"  {finding.place}" if finding.place else ""
    yield Line(f"{finding.level} {finding.rule}{place}", _STYLES[finding.level])
    yield from _indented(finding.text, width)
    for each in finding.evidence:
        for part in wrapped(f"- {each}.", width - 2, "  "):
            yield Line(f"  {part}")
    if finding.now is not None and finding.fixed is not None:
        for text in _figures(finding.now, finding.fixed, finding.basis):
            yield from _indented(text, width)
    yield Line(f"  fix, {finding.fix.where}:")
    for code in finding.fix.code.splitlines():
        yield Line(f"      {code}", "green")
    yield from _indented(f"fine when {finding.fine}", width, "dim")
    yield Line(f"  more: docs/watching/{finding.rule}.md", "dim")


def _indented(text: str, width: int, style: str = "") -> Iterator[Line]:
    for part in wrapped(text, width - 2, ""):
        yield Line(f"  {part}", style)


def _figures(now: Figures, fixed: Figures, basis: str) -> Iterator[str]:
    yield (f"a step now: {_figure_words(now)}; fixed: {_figure_words(fixed)} ({basis.partition(':')[0] or 'exact'}).")


def _figure_words(figures: Figures) -> str:
    words = (
        f"{flops_text(figures.step_flops)}, backward {flops_text(figures.backward_flops)}, saved "
        f"{bytes_text(figures.saved_bytes)}, gradients {bytes_text(figures.gradient_bytes)}"
    )
    return f"{words}{_predicted(figures)}"


def _predicted(figures: Figures) -> str:
    if figures.step_seconds is None:
        return ""
    error = "" if figures.seconds_error is None else f" ± {seconds_text(figures.seconds_error)}"
    return f", {seconds_text(figures.step_seconds)}{error} predicted"


def _who_trains(watch: Watch) -> Table:
    rows = watch.who_trains()

    def cells(key: str) -> tuple[str, ...]:
        return tuple("-" if row[key] is None else f"{row[key]:,}" for row in rows)

    columns = [Column("who trains", "", tuple(row["who"] for row in rows), left=True)]
    for title, key in (
        ("tensors", "tensors"),
        ("parameters", "numbers"),
        ("require grad", "requires_grad"),
        ("in an optimizer", "in_optimizer"),
        ("got a gradient", "got_gradient"),
        ("moved", "moved"),
    ):
        columns.append(Column(title, "", cells(key)))
    return Table(tuple(columns))


def _values(watch: Watch) -> Table:
    """The calls of the modules, as columns."""
    rows = watch.values

    def numbers(values: Sequence[float | None], form: str) -> tuple[str, ...]:
        return tuple("-" if value is None else format(value, form) for value in values)

    def shares(values: Sequence[float | None]) -> tuple[str, ...]:
        return tuple("-" if value is None else percent(value, 1) for value in values)

    return Table(
        (
            Column(f"step {rows[0].step}", "", tuple(f"{row.module} ({row.kind})" for row in rows), left=True),
            Column("in", "", tuple(", ".join(row.inputs) for row in rows), left=True),
            Column("out", "", tuple(", ".join(row.outputs) for row in rows), left=True),
            Column("mean", "", numbers([row.mean for row in rows], ".3g")),
            Column("std", "", numbers([row.std for row in rows], ".3g")),
            Column("zeros", "%", shares([row.zeros for row in rows])),
            Column("NaN/Inf", "", tuple(f"{row.nonfinite:,}" for row in rows)),
            Column("idle", "%", shares([row.idle for row in rows])),
            Column("gradient", "norm", numbers([row.gradient_norm for row in rows], ".3g")),
            Column("update", "/weight", numbers([row.update_ratio for row in rows], ".2g")),
        )
    )


def _nonfinite(fact: ValueFact) -> str:
    given = (
        f"its inputs had {fact.input_nonfinite:,} of them already" if fact.input_nonfinite else "its inputs were finite"
    )
    return (
        f"the first NaN or Inf came out of {fact.module} ({fact.kind}) in step {fact.step}: {fact.nonfinite:,} "
        f"elements of {', '.join(fact.outputs)}; {given}."
    )


def _step(watch: Watch) -> Iterator[str]:
    now, fixed = watch.now_figures, watch.fixed
    if now is None:
        return
    passes = watch.passes_in_step
    which = f" (one of the {passes} backward passes in it)" if passes > 1 else ""
    text = f"the step as it is{which}: {_step_words(now)}"
    if fixed is None or (fixed.step_flops, fixed.saved_bytes) == (now.step_flops, now.saved_bytes):
        yield f"{text}."
        return
    yield f"{text}; with all fixes: {_step_words(fixed, share(fixed.step_flops, now.step_flops))}."


def _step_words(figures: Figures, of_it: str = "") -> str:
    words = f"{flops_text(figures.step_flops)}{f' ({of_it})' if of_it else ''}, saved {bytes_text(figures.saved_bytes)}"
    return f"{words}{_predicted(figures)}"


def _faults(watch: Watch) -> Iterator[str]:
    """What no prediction has, where there is one."""
    now, taken = watch.now, watch.record.pace.fault_seconds
    if now is not None and now.seconds is not None and taken >= FAULTS_SAID * now.seconds.total:
        yield (
            f"besides, page faults took about {seconds_text(taken)} of each step: memory that one step gives back and "
            "the next takes anew. No prediction has them, but its error (±) has, and a fix may save some."
        )


def watch_to_dict(watch: Watch) -> dict[str, Any]:
    """Everything that was found, as plain data."""
    from frostline.reports.data import _head as head

    record = watch.record
    return {
        **head("watch"),
        "script": record.name,
        "ended": record.ended,
        "num_steps": record.num_steps,
        "num_backward_passes": record.num_passes,
        "models": [
            {
                "model": model.kind,
                "variable": model.variable,
                "num_parameters": sum(fact.numel for fact in model.parameters.values()),
            }
            for model in record.models
        ],
        "findings": [finding.to_dict() for finding in watch.findings],
        "who_trains": watch.who_trains(),
        "now": None if watch.now_figures is None else asdict(watch.now_figures),
        "fixed": None if watch.fixed is None else asdict(watch.fixed),
        "page_fault_seconds": watch.record.pace.fault_seconds,
        "values": [row.to_dict() for row in watch.values],
        "first_nonfinite": None if watch.first_nonfinite is None else watch.first_nonfinite.to_dict(),
        "notes": watch.notes,
    }
