"""A study's table, plots and page."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.table
from rich import box

from examples.studies.results import Finished, Results, best_rate
from examples.studies.task import Task

COLOURS = {  # of Okabe and Ito, which people who see few colours tell apart
    "everything": "#000000",
    "last": "#0072b2",
    "head": "#0072b2",
    "all": "#e69f00",
    "norms": "#cc79a7",
    "LoRA": "#56b4e9",
    "peers'": "#d55e00",
    "plan": "#009e73",
}


@dataclass(frozen=True)
class Line:
    """One row: means over seeds, and standard errors of the means (None for a single seed).

    ``clocked``: seconds of a step of the first seed's subset, measured side by side with other rows, and predicted;
    where they are known, all seconds are theirs.
    """

    label: str
    rate: float
    runs: list[Finished]
    clocked: tuple[float, float] | None = None

    def of(self, score: str) -> tuple[float, float | None]:
        """Mean and standard error."""
        return mean_and_error([run.scores[score] for run in self.runs])

    @property
    def measured_seconds(self) -> float:
        if self.clocked is not None:
            return self.clocked[0] * self.runs[0].steps
        return statistics.mean(run.measured_seconds for run in self.runs)

    @property
    def predicted_seconds(self) -> float:
        if self.clocked is not None:
            return self.clocked[1] * self.runs[0].steps
        return statistics.mean(run.predicted_seconds for run in self.runs)

    @property
    def share(self) -> float:
        return statistics.mean(run.share for run in self.runs)

    @property
    def trained(self) -> float:
        return statistics.mean(run.trained for run in self.runs)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and the standard error of the mean; None for a single value.

    >>> tuple(round(each, 3) for each in mean_and_error([1.0, 2.0, 3.0]))
    (2.0, 0.577)
    """
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.mean(values), error


@dataclass(frozen=True)
class Table:
    """What is finished of a study."""

    task: Task
    setting: str
    lines: list[Line]
    waiting: list[str]  # rows that are not finished

    @property
    def scores(self) -> list[str]:
        """The metric, then what else there is."""
        found = dict.fromkeys(name for line in self.lines for run in line.runs for name in run.scores)
        return sorted(found, key=lambda name: name != self.task.metric)

    @property
    def clocked(self) -> bool:
        return all(line.clocked is not None for line in self.lines)

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Headings and cells as text."""
        full = next((line.measured_seconds for line in self.lines if line.label == "everything"), None)
        heads = ["row", "rate", "trains", "predicted s", "measured s", "error", "predicted share", "measured share"]
        body = []
        for line in self.lines:
            measured, predicted = line.measured_seconds, line.predicted_seconds
            body.append([
                line.label, f"{line.rate:g}", f"{line.trained:,.0f}", f"{predicted:.1f}", f"{measured:.1f}",
                f"{100 * (predicted / measured - 1):+.0f} %", f"{100 * line.share:.0f} %",
                "-" if full is None else f"{100 * measured / full:.0f} %",
                *(_with_error(*line.of(score)) for score in self.scores), str(len(line.runs)),
            ])  # fmt: skip
        return [*heads, *self.scores, "seeds"], body

    def rich(self) -> rich.table.Table:
        heads, body = self.cells()
        shown = rich.table.Table(title=f"{self.task.title} ({self.setting})", box=box.SIMPLE)
        for number, head in enumerate(heads):
            shown.add_column(head, justify="right" if number else "left")
        for cells in body:
            shown.add_row(*cells)
        return shown

    def markdown(self) -> str:
        heads, body = self.cells()
        lines = [heads, ["---"] * len(heads), *body]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _with_error(mean: float, error: float | None) -> str:
    return f"{mean:.3f}" if error is None else f"{mean:.3f} ± {error:.3f}"


def table(task: Task, results: Results, setting: str, labels: Sequence[str]) -> Table:
    """The rows whose learning rate has been chosen, each by its runs at that rate (a seed may be missing yet)."""
    lines, waiting = [], []
    first = task.settings.seeds[0]
    for label in labels:
        runs = results.of(task.name, setting, label)
        tried = {run.rate for run in runs if run.seed == first}
        if set(task.settings.rates) <= tried:
            best = best_rate(runs, first)
            chosen = [run for run in runs if run.rate == best and run.seed in task.settings.seeds]
            lines.append(Line(label, best, sorted(chosen, key=lambda run: run.seed), results.clocked.get(label)))
        if not lines or lines[-1].label != label or len(lines[-1].runs) < len(task.settings.seeds):
            waiting.append(label)
    return Table(task, setting, lines, waiting)


def findings(found: Table) -> list[str]:
    """What the table says of plans, good or bad: against full training, and against last-k and biases at their time."""
    by_label = {line.label: line for line in found.lines}
    full = by_label.get("everything")
    metric = found.task.metric
    said = []
    others = [line for line in found.lines if line.label.startswith(("last", "all biases"))]
    for line in found.lines:
        if not line.label.startswith("plan") or full is None:
            continue
        (mean, error), (whole, whole_error) = line.of(metric), full.of(metric)
        margin = (error or 0.0) ** 2 + (whole_error or 0.0) ** 2
        behind = whole - mean
        where = (
            "above it" if behind <= 0
            else "within one standard error of the difference" if behind <= margin**0.5
            else f"{behind / margin**0.5:.1f} standard errors of the difference below" if margin else "below it"
        )  # fmt: skip
        text = f"{line.label}: {metric} {mean:.3f}, full training {whole:.3f}: {where}"
        cheaper = [other for other in others if other.measured_seconds <= 1.1 * line.measured_seconds]
        if cheaper:
            best = max(cheaper, key=lambda other: other.of(metric)[0])
            sign = "above" if mean > best.of(metric)[0] else "not above"
            text += f"; {sign} the best of last-k and biases in no more than 1.1 x its time ({best.label}, "
            text += f"{best.of(metric)[0]:.3f})"
        said.append(text + ".")
    return said


def write_page(task: Task, found: Table, folder: Path, missing: dict[str, str]) -> Path:
    """Write ``NAME_study.md`` and its plots into ``folder``."""
    page = folder / f"{task.name}_study.md"
    versions = next((run.versions for line in found.lines for run in line.runs), {})
    plots = [
        plot_scores(found, folder / f"{task.name}_study.svg"),
        plot_curves(found, folder / f"{task.name}_curves.svg"),
    ]
    absent = [f"- left out: {label}, because {why}." for label, why in missing.items()]
    waiting = [label for label in found.waiting if label not in missing]
    absent += [f"- not run to the end yet: {', '.join(waiting)}."] * bool(waiting)
    text = [
        f"# {task.title}",
        "",
        inspect.cleandoc(task.__doc__ or ""),
        "",
        f"Written by `python -m examples.studies.{task.name} --write`, which runs it: {found.setting}; rates "
        f"{', '.join(f'{rate:g}' for rate in task.settings.rates)}, the best by the validation examples and the first "
        f"seed; {', '.join(f'{name} {number}' for name, number in versions.items())}. Seconds are those of all "
        "training steps, optimizer included: processor time with one thread"
        + (", each row's steps taken by turns with the others' (`--clock`)" if found.clocked else "")
        + ". ± is the standard error of the mean over seeds.",
        "",
        found.markdown(),
        "",
        f"![{task.higher} against measured seconds]({plots[0].name})",
        "",
        f"![training and validation by epoch]({plots[1].name})",
        "",
        "## What it says",
        "",
        *(f"- {line}" for line in findings(found)),
        *absent,
        "",
    ]
    page.write_text("\n".join(text), encoding="utf-8")
    return page


def _figure(wide: float, high: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(wide, high), layout="constrained")


def _colour(label: str) -> str:
    return COLOURS.get(label.split()[0], "#7f7f7f")


def plot_scores(found: Table, path: Path) -> Path:
    """The metric against measured seconds, with standard errors."""
    figure = _figure(8, 5)
    place = figure.subplots()
    for line in found.lines:
        mean, error = line.of(found.task.metric)
        place.errorbar(line.measured_seconds, mean, yerr=error, fmt="o", color=_colour(line.label), capsize=3)
        place.annotate(line.label, (line.measured_seconds, mean), (5, 4), textcoords="offset points", fontsize=7)
    place.set_xlabel("measured seconds of training")
    place.set_ylabel(found.task.higher)
    place.set_xlim(left=0)
    return _saved(figure, path)


def plot_curves(found: Table, path: Path) -> Path:
    """Training loss, and scores of training and validation examples, by epoch, of the first seed."""
    figure = _figure(13, 4.5)
    places = figure.subplots(1, 3)
    for line in found.lines:
        run = line.runs[0]
        style = {"color": _colour(line.label), "linewidth": 1, "linestyle": _dashes(line.label)}
        places[0].plot(range(1, len(run.losses) + 1), run.losses, label=line.label, **style)
        places[1].plot(run.looked, run.training, **style)
        places[2].plot(run.looked, run.validated, **style)
    for place, text in zip(places, ("training loss", "training", "validation"), strict=True):
        place.set_xlabel("epoch")
        place.set_ylabel(text if text.endswith("loss") else f"{text} {found.task.metric}")
    for place in places[1:]:
        place.set_ylim(min(place.get_ylim()[0] for place in places[1:]), max(p.get_ylim()[1] for p in places[1:]))
    figure.legend(*places[0].get_legend_handles_labels(), loc="outside right center", fontsize=6)
    return _saved(figure, path)


def _dashes(label: str) -> str:
    """Rows of one colour are told apart by their dashes."""
    return {"head": "-.", "last": "--", "plan": "--", "peers'": ":"}.get(label.split()[0], "-")


def _saved(figure: Any, path: Path) -> Path:
    import matplotlib as mpl

    with mpl.rc_context({"svg.hashsalt": "frostline"}):  # the same picture is the same file
        figure.savefig(path, metadata={"Date": None})
    return path
