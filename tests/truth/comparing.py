"""Holding frostline's figures to the truth: the same subset, by the same method, really run."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from typing import Any

from tests.cases import Case
from tests.truth.reference import Method, Refused, Truth, Unreachable, measure

import frostline as fl

FIGURES = (
    "forward_flops",
    "grad_input_flops",
    "grad_weight_flops",
    "recompute_flops",
    "saved_bytes",
    "gradient_bytes",
    "optimizer_bytes",
    "parameter_bytes",
)


def trace_case(case: Case) -> fl.Trace:
    """Trace a case of the zoo as a user would."""
    if case.step is not None:
        return fl.trace(case.model, step=case.step)
    return fl.trace(case.model, case.inputs, loss=case.loss)


def differences(trace: fl.Trace, case: Case, train: Collection[str], method: Method) -> dict[str, Any]:
    """Every figure of the cost that is not exactly what the real run measured: name -> (ours, the truth)."""
    truth: Truth | None = None
    with contextlib.suppress(Unreachable, Refused):
        truth = measure(case, train, method)
    nothing_trains = truth is None or not set(truth.trained_with_grad) & set(train)
    try:
        cost = trace.cost(train=list(train), method=method)
    except fl.FrostlineError as error:
        return {} if nothing_trains else {"refused": (str(error), truth)}
    if truth is None:
        return {"not refused": (cost, None)}
    found: dict[str, Any] = {
        name: (getattr(cost, name), getattr(truth, name))
        for name in FIGURES
        if getattr(cost, name) != getattr(truth, name)
    }
    if set(cost.uncounted) != set(truth.uncounted):
        found["uncounted"] = (sorted(cost.uncounted), sorted(truth.uncounted))
    return found
