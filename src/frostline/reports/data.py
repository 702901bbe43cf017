"""Costs as plain data for JSON. Keys carry their units; ``schema.json`` beside this file says what there is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from frostline.costing.breakdown import Row
from frostline.costing.comparison import Comparison
from frostline.costing.cost import FIGURES, Cost
from frostline.costing.marginal import Change, Marginal
from frostline.reports.findings import findings, reach
from frostline.reports.header import header
from frostline.reports.peaks import moment_to_dict

if TYPE_CHECKING:
    from frostline.tracing.trace import Trace

_FIGURES = (*FIGURES, "peak_bytes", "step_seconds")

VERSION = 1
"""Of the data's form: a key is added without notice, and changed or taken away only with a new number."""


def schema() -> dict[str, Any]:
    """The JSON schema of everything below."""
    loaded: dict[str, Any] = json.loads(files("frostline.reports").joinpath("schema.json").read_text(encoding="utf-8"))
    return loaded


def cost_to_dict(cost: Cost) -> dict[str, Any]:
    """One cost with the model it is of."""
    return {**_head("cost"), "model": header(cost.trace).to_dict(), **cost_figures(cost)}


def comparison_to_dict(comparison: Comparison) -> dict[str, Any]:
    """Rows of costs, the models they are of, and what was learnt."""
    models = comparison.traces
    return {
        **_head("comparison"),
        "models": [header(trace).to_dict() for trace in models],
        "rows": [
            {"label": label, "model": _index(models, cost.trace), **cost_figures(cost)} for label, cost in comparison
        ],
        "findings": [asdict(finding) for finding in findings(comparison.rows)],
    }


def marginal_to_dict(marginal: Marginal) -> dict[str, Any]:
    """What each parameter would add or save."""
    return {
        **_head("marginal"),
        "model": header(marginal.cost.trace).to_dict(),
        "cost": cost_figures(marginal.cost),
        "adding": [_change(change) for change in marginal.adding],
        "dropping": [_change(change) for change in marginal.dropping],
        "early": None if marginal.early is None else _change(marginal.early),
    }


def breakdown_to_dict(by: str, label: str, rows: Sequence[Row]) -> dict[str, Any]:
    """The rows of a breakdown, unfolded."""
    return {"label": label, "by": by, "rows": [asdict(row) for row in rows]}


def _head(kind: str) -> dict[str, Any]:
    from frostline import __version__

    return {"version": VERSION, "kind": kind, "frostline": __version__}


def _index(models: Sequence[Trace], trace: Trace) -> int:
    return next(i for i, known in enumerate(models) if known is trace)


def cost_figures(cost: Cost) -> dict[str, Any]:
    """Every figure of a cost, without the model it is of."""
    full = cost.full
    needs = cost.slice_needs
    return {
        "subset": cost.subset.to_dict(),
        "method": cost.method,
        "optimizer": cost.optimizer,
        "num_parameters": cost.num_parameters,
        "num_trained": cost.num_trained,
        **{figure: getattr(cost, figure) for figure in _FIGURES},
        "peak": moment_to_dict(cost.peak),
        "seconds": _seconds(cost),
        "basis": dict(cost.basis),
        "full": {figure: getattr(full, figure) for figure in _FIGURES},
        "backward_reaches": reach(cost),
        "uncounted": {op: list(modules) for op, modules in cost.uncounted.items()},
        "unreached": list(cost.unreached),
        "notes": list(cost.notes),
        "slice_needs": None if needs is None else asdict(needs),
    }


def _seconds(cost: Cost) -> dict[str, Any] | None:
    """A step's seconds by part, which add up to ``step_seconds``, and the interval around that."""
    found = cost.seconds
    if found is None:
        return None
    return {"by_part": found.by_part(), "low": found.low, "high": found.high, "unknown": dict(found.unknown)}


def _change(change: Change) -> dict[str, Any]:
    return {**asdict(change), "names": list(change.names)}
