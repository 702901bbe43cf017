"""The value that ``fl.plan`` returns: the subset, what it costs, and how close it was proven to be to the best."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frostline.errors import PlanError
from frostline.planning.budgets import Budget
from frostline.subsets.subset import Match, Subset

if TYPE_CHECKING:
    from frostline.costing.cost import Cost


class SavedCost:
    """The figures of a cost that was saved: as attributes, without the trace behind them."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = dict(data)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and name in self._data:
            return self._data[name]
        raise AttributeError(f"a saved cost has no {name!r}: cost the plan again with trace.cost(plan)")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SavedCost) and self._data == other._data

    __hash__ = None  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        return dict(self._data)


@dataclass(frozen=True)
class Plan:
    """The subset worth most of those that a budget allows. Accepted wherever a subset is.

    Attributes:
        subset: what trains.
        cost: what that costs, exactly, as `frostline.Trace.cost` says it; a `SavedCost` after ``load``.
        budgets: what was allowed.
        objective: the importance of what gets a gradient; ``total``: of everything that could.
        bound: no subset that meets the budgets has more; None if nothing is known.
        gap: ``(bound - objective) / objective``: 0 if the plan was proven to be the best; None if nothing is known.
        solve_seconds: all of the planning: tables, programs, and costing again.
        method, optimizer, by, always, never: as asked for.
        importance: parameter -> what training it is worth; ``importance_source`` says where from.
        parameters: every parameter of the model, and its shape.
        versions: of frostline and torch.
        notes: what a reader should know.
    """

    subset: Subset
    cost: Cost | SavedCost
    budgets: tuple[Budget, ...]
    objective: float
    total: float
    bound: float | None
    gap: float | None
    solve_seconds: float
    method: str
    optimizer: str
    by: str
    importance: Mapping[str, float] = field(repr=False)
    importance_source: str
    always: tuple[str, ...]
    never: tuple[str, ...]
    parameters: Mapping[str, tuple[int, ...]] = field(repr=False)
    versions: Mapping[str, str]
    notes: tuple[str, ...] = ()

    @property
    def budget(self) -> dict[str, float]:
        """Figure -> what it may take at most."""
        return {budget.figure: budget.limit for budget in self.budgets}

    def check_model(self, parameters: Mapping[str, tuple[int, ...]]) -> None:
        """Raise if these are not the parameters of the model that was planned for.

        Raises:
            PlanError: it names what differs.
        """
        ours = self.parameters
        lacks = [name for name in ours if name not in parameters]
        more = [name for name in parameters if name not in ours]
        other = [
            f"{name} {list(parameters[name])} instead of {list(shape)}"
            for name, shape in ours.items()
            if name in parameters and tuple(parameters[name]) != tuple(shape)
        ]
        told = [
            f"{what} {_some(names)}"
            for what, names in (("it lacks", lacks), ("it has besides", more), ("it has", other))
            if names
        ]
        if told:
            raise PlanError(f"the plan is for another model than this one: {'; '.join(told)}. Plan for this model.")

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        from frostline.reports.plan import plan_to_dict

        return plan_to_dict(self)

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what ``save`` wrote.

        Raises:
            PlanError: there is no such file, or it holds no plan.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"there is no plan to read at {str(path)!r} ({error.strerror})") from None
        except ValueError as error:
            raise PlanError(f"{str(path)!r} is no JSON ({error}): plans are written by plan.save(path)") from None
        return cls.from_dict(data, str(path))

    @classmethod
    def from_dict(cls, data: Any, where: str = "the data") -> Plan:
        """Make a plan of what ``to_dict`` gave."""
        if not isinstance(data, dict) or data.get("kind") != "plan":
            raise PlanError(f"{where} holds no plan: plans are written by plan.save(path)")
        try:
            names = tuple(data["names"])
            parameters = {name: tuple(shape) for name, shape in data["parameters"].items()}
            budgets = tuple(Budget(b["figure"], b["limit"], b["asked"]) for b in data["budgets"])
            subset = planned_subset(names, parameters, budgets)
            gap = data["gap"]
            return cls(
                subset, SavedCost(data["cost"]), budgets, data["objective"],
                data["total"], data["bound"], gap, data["solve_seconds"], data["method"], data["optimizer"],
                data["by"], data["importance"]["scores"], data["importance"]["source"], tuple(data["always"]),
                tuple(data["never"]), parameters, data["versions"], tuple(data["notes"]),
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"{where} is no whole plan ({type(error).__name__}: {error}): plan again") from None

    def __str__(self) -> str:
        from frostline.reports.plan import plan_text

        return plan_text(self)


def planned_subset(
    names: tuple[str, ...], parameters: Mapping[str, tuple[int, ...]], budgets: tuple[Budget, ...]
) -> Subset:
    """The subset of a plan, labelled by its budgets."""
    label = f"plan within {', '.join(f'{budget.figure} {budget.asked}' for budget in budgets)}"
    shapes = {name: parameters[name] for name in names}
    return Subset(names, {}, label, (Match("plan", names),), shapes)


def gap_of(objective: float, bound: float | None) -> float | None:
    """How far the best could be beyond what was found, as a share of that."""
    if bound is None or not math.isfinite(bound):
        return None
    if bound <= objective * (1 + 1e-9):
        return 0.0
    return (bound - objective) / objective if objective > 0 else None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
