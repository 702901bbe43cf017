"""Plots of costs: memory over the step, time and memory against the number of last blocks that train, and frontiers.

matplotlib is imported only here, and only when a plot is asked for.
"""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frostline.costing.cost import Cost
from frostline.costing.moment import KINDS, Moment
from frostline.errors import FrostlineError
from frostline.reports.units import Unit, amount_unit, bytes_unit, flops_unit, seconds_unit

if TYPE_CHECKING:
    from frostline.planning.frontier import Frontier

FORMATS = (".png", ".svg")
MOST_ROWS = 12  # plots of one picture

_COLOURS = {  # of Okabe and Ito, which people who see few colours tell apart
    "weights": "#7f7f7f",
    "inputs": "#cccccc",
    "gradients": "#d55e00",
    "optimizer_state": "#cc79a7",
    "saved_activations": "#0072b2",
    "transients": "#56b4e9",
    "scratch": "#f0e442",
}


def check_plot(path: str) -> Path:
    """The path, if a plot can be written there.

    Raises:
        FrostlineError: another format, a folder that is not there, or no matplotlib.
    """
    file = Path(path)
    if file.suffix.lower() not in FORMATS:
        raise FrostlineError(f"a plot is written as {' or '.join(FORMATS)}, not {path!r}")
    if not file.absolute().parent.is_dir():
        raise FrostlineError(f"there is no folder {str(file.parent)!r} to write {file.name} into")
    if importlib.util.find_spec("matplotlib") is None:
        raise FrostlineError("a plot needs matplotlib: pip install 'frostline[plot]'")
    return file


def plot_memory(rows: Sequence[tuple[str, Cost]], path: str | Path) -> None:
    """Draw what is in memory at every moment of a step, stacked by kind: one plot a row, on one scale."""
    file = check_plot(str(path))
    shown = [(label, cost, cost.memory_timeline()) for label, cost in rows[:MOST_ROWS]]
    unit = bytes_unit([cost.peak_bytes for _, cost, _ in shown])
    wide = 2 if len(shown) > 1 else 1
    high = -(-len(shown) // wide)
    figure = _figure(6.5 * wide, 3.2 * high + 0.5)
    places = figure.subplots(high, wide, sharey=True, squeeze=False).flatten()
    for place, (label, cost, moments) in zip(places, shown, strict=False):
        _draw_memory(place, moments, unit)
        place.set_title(f"{label}: peak {unit(cost.peak_bytes)} {unit.name}", fontsize=10, loc="left")
    for place in places[len(shown) :]:
        place.set_visible(False)
    for place in places[::wide]:
        place.set_ylabel(unit.name)
    names = [kind.replace("_", " ") for kind in KINDS]
    figure.legend(places[0].collections[: len(KINDS)], names, loc="outside lower center", ncols=4, fontsize=8)
    if len(rows) > len(shown):
        figure.suptitle(f"the first {len(shown)} of {len(rows)} rows", fontsize=10)
    figure.savefig(file)


def plot_sweep(points: Sequence[tuple[int, Cost]], path: str | Path) -> None:
    """Draw time (FLOPs where it is not known) and memory against the number of last blocks that train."""
    file = check_plot(str(path))
    counts = [count for count, _ in points]
    costs = [cost for _, cost in points]
    figure = _figure(10, 4)
    left, right = figure.subplots(1, 2)
    seconds = [cost.step_seconds for cost in costs]
    timed = [value for value in seconds if value is not None]
    flops = [cost.step_flops for cost in costs]
    if len(timed) == len(costs):
        _draw_curve(left, counts, timed, seconds_unit(timed), "seconds of a step", costs[0].full.step_seconds)
    else:
        _draw_curve(left, counts, flops, flops_unit(flops), "FLOPs of a step", costs[0].full.step_flops)
    peaks = [cost.peak_bytes for cost in costs]
    _draw_curve(right, counts, peaks, bytes_unit(peaks), "peak memory", costs[0].full.peak_bytes)
    figure.suptitle(f"{type(costs[0].trace.model).__name__}, by {costs[0].method}, {costs[0].optimizer}", fontsize=10)
    figure.savefig(file)


def plot_frontier(frontier: Frontier, path: str | Path) -> None:
    """Draw the importance that each budget wins, as a share, against what it takes of its figure."""
    file = check_plot(str(path))
    figure = _figure(6.5, 4)
    place = figure.subplots()
    takes = [next(b for b in plan.to_dict()["budgets"] if b["figure"] == frontier.over)["spent"] for plan in frontier]
    unit = amount_unit(frontier.over, takes)
    won = [100 * plan.objective / (plan.total or 1.0) for plan in frontier]
    along = [took / unit.size for took in takes]
    place.plot(along, won, marker="o", markersize=4, color="#0072b2")
    at = frontier.knee
    place.plot([along[at]], [won[at]], marker="o", markersize=9, fillstyle="none", color="#d55e00")
    place.annotate("knee", (along[at], won[at]), xytext=(8, -10), textcoords="offset points", fontsize=8)
    if frontier.full:
        place.axvline(frontier.full / unit.size, color="#7f7f7f", linestyle="--", linewidth=0.8)
        place.annotate("everything trained", (frontier.full / unit.size, 0), ha="right", va="bottom", fontsize=8)
    place.set_xlabel(f"{frontier.over}, {unit.name}" if unit.name else frontier.over)
    place.set_ylabel("importance won, %")
    place.set_xlim(left=0)
    place.set_ylim(0, 105)
    first = frontier.points[0]
    figure.suptitle(f"{type(frontier.trace.model).__name__}, by {first.method}, {first.optimizer}", fontsize=10)
    figure.savefig(file)


def _figure(width: float, height: float) -> Any:
    """A figure of no window: nothing of the caller's matplotlib changes."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _draw_memory(place: Any, moments: Sequence[Moment], unit: Unit) -> None:
    heights = [[moment.by_kind[kind] / unit.size for moment in moments] for kind in KINDS]
    places = range(len(moments))
    place.stackplot(places, heights, colors=[_COLOURS[kind] for kind in KINDS], step="mid", linewidth=0)
    begins = [i for i in places if i == 0 or moments[i].phase != moments[i - 1].phase]
    top = max(moment.nbytes for moment in moments) / unit.size
    for begin in begins:
        place.axvline(begin - 0.5, color="black", linewidth=0.6, linestyle=":")
        if moments[begin].phase != "optimizer":  # one moment wide: its name has no room
            late = begin > 0.8 * len(moments)
            place.annotate(
                moments[begin].phase,
                (begin, 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(-3 if late else 3, -3),
                textcoords="offset points",
                ha="right" if late else "left",
                va="top",
                fontsize=8,
            )
    fullest = max(places, key=lambda i: moments[i].nbytes)
    where = moments[fullest].module or moments[fullest].op.removesuffix(".default")
    place.plot([fullest], [top], marker="v", color="black", markersize=4)
    place.annotate(
        textwrap.shorten(where.replace(".", ". "), 48, placeholder="...").replace(". ", "."),
        (fullest, top),
        xytext=(0, 5),
        textcoords="offset points",
        ha="right" if fullest > len(moments) / 2 else "left",
        fontsize=7,
    )
    place.set_xlim(-0.5, len(moments) - 0.5)
    place.set_ylim(bottom=0, top=max(place.get_ylim()[1], top * 1.18))
    place.set_xlabel("moments of the step: op by op", fontsize=8)


def _draw_curve(
    place: Any, counts: Sequence[int], values: Sequence[float], unit: Unit, title: str, whole: float | None
) -> None:
    place.plot(counts, [value / unit.size for value in values], marker="o", markersize=4, color="#0072b2")
    if whole is not None:
        place.axhline(whole / unit.size, color="#7f7f7f", linestyle="--", linewidth=0.8)
        place.annotate("everything trained", (counts[0], whole / unit.size), va="bottom", fontsize=8)
    place.set_title(title, fontsize=10, loc="left")
    place.set_ylabel(unit.name)
    place.set_ylim(bottom=0)
    place.set_xlabel("last blocks trained (0: the head alone)")
    place.xaxis.get_major_locator().set_params(integer=True)
