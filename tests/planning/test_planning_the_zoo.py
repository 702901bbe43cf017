"""Over the zoo: what a problem's tables add up to is the cost, for random subsets and both methods."""

from __future__ import annotations

import random

import pytest
from tests.cases import CASES, Case, CaseBuilder

import frostline as fl
from frostline.costing.entry import numbers_in
from frostline.planning.plan import Planner
from frostline.planning.tables import Entangled

FIGURES = ("backward_flops", "optimizer_bytes", "saved_bytes", "step_flops", "trainable_parameters")
SUBSETS = 12


def trace_of(case: Case) -> fl.Trace:
    if case.step is not None:
        return fl.trace(case.model, step=case.step)
    return fl.trace(case.model, case.inputs, case.loss)


@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
def test_tables_add_up_to_the_cost_and_plans_to_their_proof(case: CaseBuilder) -> None:
    if case.missing:
        pytest.skip(case.missing)
    trace = trace_of(case())
    choose = random.Random(case.name)
    importance = {name: choose.random() for name in trace.parameters}
    for method in ("freeze", "train-only"):
        planner = Planner(trace, importance, None, None, method, "tensor", "adamw")
        try:
            search = planner.search(FIGURES)
        except Entangled:
            pytest.skip("every subset is a run of the whole step")
        except fl.FrostlineError as error:
            if "sets of parameters at once" not in str(error):
                raise
            pytest.skip(str(error))
        problem = search.problem
        for _ in range(SUBSETS):
            share = choose.random()
            chosen = sum(1 << n for n in range(len(problem.choices)) if choose.random() < share) or 1
            names = [planner.offer.names[n] for n in numbers_in(problem.parameters(chosen))]
            assessed = problem.assess(chosen)
            try:
                cost = trace.cost(names, method=method)
            except fl.FrostlineError:
                assert assessed.refused or not assessed.trained
                continue
            said = {f: cost.num_trained if f == "trainable_parameters" else getattr(cost, f) for f in FIGURES}
            assert assessed.amounts == said
            assert assessed.worth == pytest.approx(sum(importance[n] for n in names if n not in cost.unreached))
        budget = {"step_flops": "75%", "saved_bytes": "75%"}
        try:
            plan = fl.plan(trace, budget, importance, method=method, time_limit=60)
        except fl.FrostlineError as error:
            if "the least possible" in str(error) or "budget step_flops must be" in str(error):  # (no FLOPs at all)
                continue
            raise
        assert plan.gap == 0
        assert all(plan.budget[f] >= getattr(plan.cost, f) for f in budget)
