"""``frostline cost``: what training a subset costs, before it runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from frostline.cli.options import AsJson, Debug, Device, EvalMode, Freeze, Inputs, Loss, Method, ModelClass, Optimizer
from frostline.cli.terminal import progress, report_width, saying
from frostline.errors import FrostlineError, TraceError

if TYPE_CHECKING:
    from frostline.cli.rows import Asked
    from frostline.costing.cost import Cost
    from frostline.reports.lines import Line
    from frostline.tracing.trace import Trace

EXAMPLES = """\b
Examples:
  frostline cost examples/small.py:digits_cnn
  frostline cost train.py:build --train @head --train "last two=@last:2" --method freeze --method optimizer-only
  frostline cost train.py
  frostline cost meta-llama/config.json --input 1x2048 --train @last:4
  frostline cost full.py:model lora.py:model --train "adapters=*lora*" --train @last:4
  frostline cost train.py:build --train @head --train @all --time --plot memory.svg
  frostline cost train.py:build --sweep last
  frostline cost train.py:build --train @norms --marginal --by module --json
"""


class Breakdown(StrEnum):
    """What ``--by`` parts a cost into."""

    module = "module"
    op = "op"
    parameter = "parameter"


class Sweep(StrEnum):
    """What ``--sweep`` varies."""

    last = "last"


def cost(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET ...",
            help="file.py:name or package.module:name, a function that returns model, (model, inputs) or (model, "
            "inputs, loss); the path of a Hugging Face config.json (or its folder), built without weights; or a "
            'training script, "train.py ARGS", which is run until its second step.',
        ),
    ],
    train: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATTERN[,PATTERN]",
            help="A row: names or globs of parameters or modules, a slice, @now @all @head @biases @norms @last:K, or "
            "a plan's FILE.json; a leading ! takes away. Repeat for more rows. Without any: the built-in ones.",
        ),
    ] = None,
    freeze: Freeze = None,
    method: Method = None,
    optimizer: Optimizer = "adamw",
    time: Annotated[
        bool,
        typer.Option("--time", help="Time the ops that the rows need, one at a time, and predict a step's seconds."),
    ] = False,
    at_peak: Annotated[
        bool, typer.Option("--at-peak", help="What is in memory at each row's fullest moment; --time shows it too.")
    ] = False,
    plot: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.png|.svg",
            help="Draw memory over the step, a plot a row; with --sweep: time and memory against the last blocks.",
        ),
    ] = None,
    sweep: Annotated[Sweep | None, typer.Option(help="The curve of how many last blocks train.")] = None,
    marginal: Annotated[
        bool, typer.Option("--marginal", help="What each parameter more would add, and each one less would save.")
    ] = False,
    by: Annotated[Breakdown | None, typer.Option(help="Where each row's cost is paid.")] = None,
    depth: Annotated[
        int | None, typer.Option(min=1, help="Names that --by module keeps; default: to the blocks.")
    ] = None,
    inputs: Inputs = None,
    model_class: ModelClass = None,
    device: Device = None,
    eval_mode: EvalMode = False,
    loss: Loss = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say what training a subset of a model costs: FLOPs and bytes, exactly, before it runs.

    Each --train is a row, and shares are of training everything.
    """
    from frostline.cli.loading import check_loss, traced
    from frostline.cli.rows import asked_rows
    from frostline.targets import load

    check_loss(loss)
    if plot is not None:
        _check_plot(plot, sweep, targets)
    asked = asked_rows(train or (), freeze or (), len(targets))
    methods = tuple(dict.fromkeys(method or ("freeze",)))
    rows: list[tuple[str, Cost]] = []
    traces: list[Trace] = []
    notes: list[str] = []
    names = _distinct([t.rpartition(":")[2] if ":" in t else t for t in targets])
    for spec, name in zip(targets, names, strict=True):
        with saying(f"tracing {spec}"):
            target = load(spec, inputs or (), model_class, loss)
            trace = traced(spec, target, device, eval_mode)
        traces.append(trace)
        with saying(f"costing {spec}"):
            prefix = name if len(targets) > 1 else ""
            own, said = _costs(trace, asked, methods, optimizer, prefix, bool(train))
        rows += own
        notes += [*([target.note] if target.note else []), *said]
    extra = _Extra(at_peak or time, marginal, by, depth, bool(train or freeze))
    sweeps = [(trace, _swept(trace, optimizer)) for trace in traces] if sweep is not None else []
    if time:
        _time(traces, [*(c for _, c in rows), *(c for _, points in sweeps for _, c in points)], optimizer)
    report = _Report(list(targets), rows, notes, traces, sweeps)
    if plot is not None:
        report.plot(plot)
    if as_json:
        print(json.dumps(report.data(extra), indent=2))
    else:
        report.show(extra)


def _distinct(names: list[str]) -> list[str]:
    return [f"{name}#{i + 1}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _costs(
    trace: Trace, asked: list[Asked], methods: tuple[str, ...], optimizer: str, prefix: str, insisted: bool
) -> tuple[list[tuple[str, Cost]], list[str]]:
    """The rows of one target; a built-in subset that the loss does not reach is left out with a note."""
    from frostline.cli.rows import nothing_left, resolved

    subsets, notes = resolved(asked, trace.model)
    rows = []
    for label, subset in subsets.items():
        for method in methods:
            try:
                found = trace.cost(subset, method=method, optimizer=optimizer)
            except TraceError as error:
                if insisted:
                    raise
                notes.append(f"no row {label}: {error}")
                break
            name = f"{prefix} {label}" if prefix else label
            rows.append((f"{name} by {method}" if len(methods) > 1 else name, found))
    if not rows:
        raise nothing_left(notes, trace.model)
    return rows, [f"{prefix}: {note}" if prefix else note for note in notes]


def _check_plot(plot: str, sweep: Sweep | None, targets: list[str]) -> None:
    """Say what is wrong with a plot before anything is traced."""
    from frostline.reports.plots import check_plot

    check_plot(plot)
    if sweep is not None and len(targets) > 1:
        raise FrostlineError("--plot draws the sweep of one TARGET")


def _swept(trace: Trace, optimizer: str) -> list[tuple[int, Cost]]:
    from frostline.costing.comparison import sweep_last

    with saying("sweeping the last blocks"):
        return sweep_last(trace, "freeze", optimizer)


def _time(traces: list[Trace], costs: list[Cost], optimizer: str) -> None:
    """Time what these costs need, and what their shares are shares of."""
    with progress("timing ops") as advance:
        for trace in traces:
            own = [cost for cost in costs if cost.trace is trace]
            if own:
                trace.calibrate([*own, own[0].full], optimizer, advance)


class _Extra:
    """Which parts beside the table were asked for."""

    def __init__(self, at_peak: bool, marginal: bool, by: Breakdown | None, depth: int | None, insisted: bool) -> None:
        self.at_peak = at_peak
        self.marginal = marginal
        self.by = by
        self.depth = depth
        self.insisted = insisted

    def rows(self, rows: list[tuple[str, Cost]]) -> list[tuple[str, Cost]]:
        """Which rows get a breakdown: those asked for, or the last one (everything)."""
        return rows if self.insisted else rows[-1:]


class _Report:
    """Everything one command found, as lines or as data."""

    def __init__(
        self,
        targets: list[str],
        rows: list[tuple[str, Cost]],
        notes: list[str],
        traces: list[Trace],
        sweeps: list[tuple[Trace, list[tuple[int, Cost]]]],
    ) -> None:
        from frostline.costing.comparison import Comparison

        self.targets = targets
        self.rows = rows
        self.notes = notes
        self.traces = traces
        self.sweeps = sweeps
        self.comparison = Comparison(tuple(rows))

    def show(self, extra: _Extra) -> None:
        from rich.console import Console

        from frostline.reports.text import show

        console = Console(highlight=False)
        show(self.lines(extra, report_width(console)), console)

    def lines(self, extra: _Extra, width: int) -> Iterator[Line]:
        from frostline.reports.lines import bullet
        from frostline.reports.sweep import sweep_lines
        from frostline.reports.text import breakdown_lines, comparison_lines, marginal_lines

        yield from comparison_lines(self.comparison, width, at_peak=extra.at_peak)
        for note in self.notes:
            yield from bullet(note, width, "dim")
        for trace, points in self.sweeps:
            yield from sweep_lines(trace, points, width)
        for label, cost in extra.rows(self.rows):
            if extra.by is not None:
                yield from breakdown_lines(_broken_down(cost, extra), cost, extra.by.value, label, width)
            if extra.marginal and (cost.method == "freeze" or self.comparison.only_method == cost.method):
                yield from marginal_lines(_marginal(cost), width, label)

    def data(self, extra: _Extra) -> dict[str, Any]:
        from dataclasses import asdict

        from frostline.reports.data import breakdown_to_dict, cost_figures, marginal_to_dict
        from frostline.reports.findings import Finding

        found = self.comparison.to_dict()
        found |= {"kind": "report", "targets": self.targets}
        found["findings"] += [asdict(Finding("note", note)) for note in self.notes]
        if self.sweeps:
            found["sweep"] = [
                {
                    "model": self.traces.index(trace),
                    "num_blocks": max(k for k, _ in points),
                    "points": [{"last": k, "cost": cost_figures(cost)} for k, cost in points],
                }
                for trace, points in self.sweeps
            ]
        rows = extra.rows(self.rows)
        if extra.by is not None:
            by = extra.by.value
            found["breakdowns"] = [breakdown_to_dict(by, label, _broken_down(cost, extra)) for label, cost in rows]
        if extra.marginal:
            found["marginals"] = [marginal_to_dict(_marginal(cost)) for _, cost in rows]
        return found

    def plot(self, path: str) -> None:
        from frostline.reports.plots import plot_memory, plot_sweep

        if self.sweeps:
            plot_sweep(self.sweeps[0][1], path)
        else:
            plot_memory(self.rows, path)


def _broken_down(cost: Cost, extra: _Extra) -> list[Any]:
    if extra.by is Breakdown.op:
        return cost.by_op()
    if extra.by is Breakdown.parameter:
        return cost.by_parameter()
    return cost.by_module(extra.depth or _depth_of_blocks(cost))


def _depth_of_blocks(cost: Cost) -> int:
    from frostline.subsets import blocks

    found = blocks(cost.trace.model)
    return max((len(name.split(".")) for name in found), default=2)


def _marginal(cost: Cost) -> Any:
    from frostline.costing.marginal import marginal

    with progress("costing one parameter more, one less") as advance:
        return marginal(cost.trace, cost.subset, cost.method, cost._optimizer, advance)
