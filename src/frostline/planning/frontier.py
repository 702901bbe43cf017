"""``fl.frontier``: what a budget buys, from the smallest that buys anything to training everything."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frostline.costing.entry import bits_of
from frostline.errors import PlanError
from frostline.planning.budgets import Budget, check_figure, read_budgets, spent
from frostline.planning.plan import Planner
from frostline.planning.result import Plan
from frostline.planning.tables import Entangled

if TYPE_CHECKING:
    from frostline.tracing.trace import Trace


@dataclass(frozen=True)
class Frontier:
    """Plans for growing budgets of one figure; ``print(frontier)`` is a table.

    Attributes:
        over: the figure.
        points: the plans, the smallest budget first; no later one is worth less.
        knee: the place in ``points`` beyond which a budget buys less than the curve does on the whole: where it lies
            furthest above the straight line between its ends. Source: Satopaa, Albrecht, Irwin and Raghavan, "Finding
            a Kneedle in a Haystack", 2011.
        full: what training everything takes of the figure.
        solve_seconds: of all points.
    """

    over: str
    points: tuple[Plan, ...]
    knee: int
    full: float
    solve_seconds: float
    trace: Trace = field(repr=False)

    def __iter__(self) -> Iterator[Plan]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, place: int) -> Plan:
        return self.points[place]

    @property
    def at_knee(self) -> Plan:
        """The plan at the knee."""
        return self.points[self.knee]

    def plot(self, path: str | Path) -> None:
        """Draw importance won against the figure, as .png or .svg."""
        from frostline.reports.plots import plot_frontier

        plot_frontier(self, path)

    def to_dict(self) -> dict[str, Any]:
        """Every point, for JSON."""
        from frostline.reports.plan import frontier_to_dict

        return frontier_to_dict(self)

    def __str__(self) -> str:
        from frostline.reports.plan import frontier_text

        return frontier_text(self)


def frontier(
    trace: Trace,
    over: str = "step_seconds",
    importance: Any = None,
    *,
    points: int = 12,
    budget: Mapping[str, Any] | None = None,
    always: Any = None,
    never: Any = None,
    method: str = "freeze",
    by: str = "tensor",
    optimizer: Any = "adamw",
    time_limit: float = 10.0,
) -> Frontier:
    """Plan for ``points`` budgets of one figure, evenly from the least that trains anything to all that can be won.

    Args:
        over: the figure: see `frostline.plan`.
        budget: what holds at every point besides.
        time_limit: seconds for the search of each point.

    The other arguments are those of `frostline.plan`.

    Raises:
        PlanError: as `frostline.plan`; or fewer than two points.
    """
    started = time.perf_counter()
    if isinstance(points, bool) or not isinstance(points, int) or points < 2:
        raise PlanError(f"a frontier has at least 2 points, got {points!r}")
    planner = Planner(trace, importance, always, never, method, by, optimizer)
    full = spent(planner.full, check_figure(over, planner.full))
    rest = () if not budget else read_budgets(budget, planner.full)
    if over in {other.figure for other in rest}:
        raise PlanError(f"{over} is what the frontier goes over: take it out of budget=")
    limits = {other.figure: other.limit for other in rest}
    try:
        search = planner.search((over, *limits))
    except Entangled as why:
        raise PlanError(
            f"each subset of this model is a run of the whole step ({why}): plan for single budgets with fl.plan"
        ) from None
    low = search.least(over, limits, time_limit)
    if low is None:
        raise PlanError(
            "no subset meets the budget= of the frontier: plan for it with fl.plan to see the least that does"
        )
    # (The end: what the most that can be won takes, found by a budget that nothing breaks.)
    whole = 2 * max(full, low[1]) + 1
    everything = planner.plan((*rest, Budget(over, whole, "everything")), time_limit)
    high = spent(everything.cost, over)  # type: ignore[arg-type]
    found: list[Plan] = []
    for number in range(points):
        limit = low[1] + (high - low[1]) * number / (points - 1)
        limit = limit if over == "step_seconds" else float(round(limit))
        limit = low[1] if number == 0 else high if number == points - 1 else limit
        asked = f"{100 * limit / full:.4g}%" if full else f"{limit:,}"
        start = bits_of(trace.parameter_numbers[name] for name in found[-1].subset.names) if found else None
        found.append(planner.plan((*rest, Budget(over, limit, asked)), time_limit, start=start))
    return Frontier(over, tuple(found), _knee(found, over), full, time.perf_counter() - started, trace)


def _knee(points: list[Plan], over: str) -> int:
    """The point furthest above the line between the first and the last."""
    takes = [spent(point.cost, over) for point in points]  # type: ignore[arg-type]
    wide, high = takes[-1] - takes[0] or 1.0, points[-1].objective - points[0].objective or 1.0
    above = [
        (point.objective - points[0].objective) / high - (took - takes[0]) / wide
        for point, took in zip(points, takes, strict=True)
    ]
    return max(range(len(points)), key=above.__getitem__)
