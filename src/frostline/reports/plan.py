"""Plans and frontiers in words, as tables and as data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from frostline.costing.cost import Cost
from frostline.planning.budgets import Budget
from frostline.planning.frontier import Frontier
from frostline.planning.result import Plan
from frostline.reports.data import VERSION, cost_figures
from frostline.reports.findings import reach
from frostline.reports.header import header
from frostline.reports.lines import WIDTH, Line, bullet, header_lines, plain, table_lines, wrapped
from frostline.reports.names import collapsed, summary
from frostline.reports.table import Column, Table, shortened
from frostline.reports.units import amount_text, percent, seconds_text, share

if TYPE_CHECKING:
    from frostline.tracing.trace import Trace

MOST_NAMES = 12  # printed; the data has all


def plan_text(plan: Plan, width: int = WIDTH) -> str:
    return plain(plan_lines(plan, width))


def plan_lines(plan: Plan, width: int = WIDTH, trace: Trace | None = None) -> Iterator[Line]:
    """What trains, how close to the best that is, and each budget beside what the plan takes of it.

    ``trace``: print the header of what was traced.
    """
    if trace is not None:
        yield from header_lines(header(trace).lines(), width)
        yield Line("")
    names = list(plan.parameters)
    trains = share(_num_trained(plan), plan.cost.num_parameters)
    what = f"{len(plan.subset.names)} of {len(names)} tensors" if len(plan.subset.names) > 1 else "1 tensor"
    for text in wrapped(f"train {what}, {trains} of the parameters: {_names(plan)}", width, "  "):
        yield Line(text, "bold")
    yield Line("")
    yield from table_lines(_budget_table(plan))
    yield Line("")
    yield from bullet(_certificate(plan), width)
    if isinstance(plan.cost, Cost):
        yield from bullet(f"backward reaches {reach(plan.cost)}.", width)
    for told, given in (("always", plan.always), ("never", plan.never)):
        if given:
            yield from bullet(f"{told}: {summary(given, names)}.", width)
    for note in plan.notes:
        yield from bullet(f"note: {note}.", width, "yellow")
    yield from bullet(_legend(plan), width, "dim")


def _names(plan: Plan) -> str:
    found = collapsed(plan.subset.names, list(plan.parameters))
    if set(plan.subset.names) >= set(plan.parameters):
        return "everything"
    few = summary(plan.subset.names, list(plan.parameters), MOST_NAMES)
    if not few.endswith(" tensors"):
        return few
    return ", ".join(found[:MOST_NAMES]) + (f" and {len(found) - MOST_NAMES} more" if len(found) > MOST_NAMES else "")


def _num_trained(plan: Plan) -> int:
    return int(plan.cost.num_trained)


def _took(plan: Plan, figure: str) -> float:
    found: float = plan.cost.num_trained if figure == "trainable_parameters" else getattr(plan.cost, figure)
    return found


def _full(plan: Plan, figure: str) -> float | None:
    if figure == "trainable_parameters":
        return float(plan.cost.num_parameters)
    full = plan.cost.full
    found: float | None = full[figure] if isinstance(full, dict) else getattr(full, figure)
    return found


def _basis(plan: Plan, figure: str) -> str:
    figure = "parameter_bytes" if figure == "trainable_parameters" else figure
    return str(plan.cost.basis.get(figure, "")).partition(":")[0]


def _budget_table(plan: Plan) -> Table:
    budgets = plan.budgets

    def column(title: str, cells: list[str], left: bool = False) -> Column:
        return Column(title, "", tuple(cells), left=left)

    def of_all(budget: Budget) -> str:
        full = _full(plan, budget.figure)
        return percent(_took(plan, budget.figure), full) if full else "-"

    return Table(
        (
            column("budget", [b.figure for b in budgets], left=True),
            column("asked", [b.asked for b in budgets]),
            column("allowed", [amount_text(b.figure, b.limit) for b in budgets]),
            column("plan", [amount_text(b.figure, _took(plan, b.figure)) for b in budgets]),
            Column("of it", "%", tuple(percent(_took(plan, b.figure), b.limit) for b in budgets)),
            Column("of all", "%", tuple(of_all(b) for b in budgets)),
            column("basis", [_basis(plan, b.figure) for b in budgets], left=True),
        )
    )


def _certificate(plan: Plan) -> str:
    won = f"importance won: {_worth(plan.objective)} of {_worth(plan.total)} ({share(plan.objective, plan.total)})"
    if plan.gap == 0:
        return f"{won}; proven: no subset within the budget has more. Found in {seconds_text(plan.solve_seconds)}."
    took = f"found in {seconds_text(plan.solve_seconds)}"
    if plan.bound is None:
        return f"{won}; how much more is possible within the budget is not known; {took}."
    more = "" if plan.gap is None else f", {_gap_text(plan.gap)} more"
    return f"{won}; no subset within the budget has more than {_worth(plan.bound)}{more}; {took}."


def _worth(value: float) -> str:
    """
    >>> _worth(83213.0), _worth(0.03125), _worth(12.5)
    ('83,213', '0.03125', '12.5')
    """
    return f"{value:,.0f}" if value >= 10_000 else f"{value:.4g}"


def _gap_text(gap: float) -> str:
    return f"{100 * gap:.2g} %" if gap >= 1e-5 else "<0.001 %"


def _legend(plan: Plan) -> str:
    by = "tensor by tensor" if plan.by == "tensor" else "layer by layer"
    return (
        f"by {plan.method}; {plan.optimizer} state; {by}; importance: {plan.importance_source}; shares are of training "
        "everything by freeze."
    )


# -- frontiers --------------------------------------------------------------------------------------------------------


def frontier_text(frontier: Frontier, width: int = WIDTH) -> str:
    return plain(frontier_lines(frontier, width))


def frontier_lines(frontier: Frontier, width: int = WIDTH) -> Iterator[Line]:
    """Header; a row a budget, the knee marked; what the knee is."""
    yield from header_lines(header(frontier.trace).lines(), width)
    yield Line("")

    def table(room: int) -> Table:
        names = list(frontier.points[0].parameters)
        words = [summary(plan.subset.names, names) for plan in frontier]
        return Table(
            (
                Column("", "", tuple("knee" if n == frontier.knee else "" for n in range(len(frontier))), left=True),
                Column(frontier.over, "", tuple(amount_text(frontier.over, _took(p, frontier.over)) for p in frontier)),
                Column("of all", "%", tuple(percent(_took(p, frontier.over), frontier.full) for p in frontier)),
                Column("importance", "%", tuple(percent(p.objective, p.total) for p in frontier)),
                Column("gap", "%", tuple(_gap_cell(p) for p in frontier)),
                Column("tensors", "", tuple(f"{len(p.subset.names)}" for p in frontier)),
                Column("trains", "%", tuple(percent(_num_trained(p), p.cost.num_parameters, 2) for p in frontier)),
                Column("", "", tuple(shortened(word, room) for word in words), left=True),
            )
        )

    whole = table(1000)
    over = whole.width - width
    yield from table_lines(whole if over <= 0 else table(max(12, whole.columns[-1].width - over)))
    yield Line("")
    knee = frontier.at_knee
    yield from bullet(
        f"the knee: {amount_text(frontier.over, _took(knee, frontier.over))} of {frontier.over} "
        f"({share(_took(knee, frontier.over), frontier.full)} of training everything) wins "
        f"{share(knee.objective, knee.total)} of the importance; beyond it each budget buys less.",
        width,
    )
    for note in dict.fromkeys(note for plan in frontier for note in plan.notes):
        yield from bullet(f"note: {note}.", width, "yellow")
    took = f"found in {seconds_text(frontier.solve_seconds)}"
    yield from bullet(f"{took}; {_legend(knee)}", width, "dim")


def _gap_cell(plan: Plan) -> str:
    return "-" if plan.gap is None else "0" if plan.gap == 0 else _gap_text(plan.gap).removesuffix(" %")


# -- data -------------------------------------------------------------------------------------------------------------


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """Every figure; see ``schema.json``."""
    return {
        "version": VERSION,
        "kind": "plan",
        "frostline": plan.versions["frostline"],
        "versions": dict(plan.versions),
        **plan_figures(plan),
        "importance": {"source": plan.importance_source, "scores": dict(plan.importance)},
        "parameters": {name: list(shape) for name, shape in plan.parameters.items()},
    }


def plan_figures(plan: Plan) -> dict[str, Any]:
    """A plan without what is the same for every plan of a model."""
    return {
        "names": list(plan.subset.names),
        "budgets": [
            {"figure": b.figure, "asked": b.asked, "limit": b.limit, "spent": _took(plan, b.figure)}
            for b in plan.budgets
        ],
        "objective": plan.objective,
        "total": plan.total,
        "bound": plan.bound,
        "gap": plan.gap,
        "solve_seconds": plan.solve_seconds,
        "method": plan.method,
        "optimizer": plan.optimizer,
        "by": plan.by,
        "always": list(plan.always),
        "never": list(plan.never),
        "cost": cost_figures(plan.cost) if isinstance(plan.cost, Cost) else plan.cost.to_dict(),
        "notes": list(plan.notes),
    }


def frontier_to_dict(frontier: Frontier) -> dict[str, Any]:
    """Every point; see ``schema.json``."""
    from frostline import __version__

    first = frontier.points[0]
    return {
        "version": VERSION,
        "kind": "frontier",
        "frostline": __version__,
        "model": header(frontier.trace).to_dict(),
        "over": frontier.over,
        "full": frontier.full,
        "knee": frontier.knee,
        "solve_seconds": frontier.solve_seconds,
        "points": [plan_figures(plan) for plan in frontier],
        "importance": {"source": first.importance_source, "scores": dict(first.importance)},
    }
