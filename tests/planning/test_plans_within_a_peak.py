"""Plans within a peak: no sum, so what was proven is held to every subset there is."""

from __future__ import annotations

import random

import pytest
from tests.planning.brute_force import best_within, every_subset
from tests.planning.small_networks import small_network

import frostline as fl
from frostline.planning.plan import Planner
from frostline.planning.problem import Problem
from frostline.planning.search import Search


@pytest.mark.parametrize("seed", range(12))
def test_a_plan_within_a_peak_meets_it_and_its_bound_is_a_bound(seed: int) -> None:
    choose = random.Random(f"peak {seed}")
    model, given = small_network(seed, 8)
    trace = fl.trace(model, given)
    method = choose.choice(["freeze", "train-only"])
    importance = {name: choose.random() ** 2 for name in trace.parameters}
    tried = every_subset(trace, importance, method, ["peak_bytes", "step_flops"])
    for figures in (["peak_bytes"], ["peak_bytes", "step_flops"]):
        limits = {figure: choose.choice(tried).figures[figure] for figure in figures}
        best = best_within(tried, limits)
        if best is None:
            with pytest.raises(fl.FrostlineError, match="no subset meets the budget"):
                fl.plan(trace, limits, importance, method=method)
            continue
        plan = fl.plan(trace, limits, importance, method=method, time_limit=30)
        assert plan.cost.peak_bytes <= limits["peak_bytes"]
        assert plan.bound is not None
        assert plan.bound >= best.worth * (1 - 1e-9)
        if plan.gap == 0:
            assert plan.objective == pytest.approx(best.worth)
        assert plan.objective >= 0.9 * best.worth


def rows_of(planner: Planner) -> tuple[Search, Problem]:
    search = planner.search(("peak_bytes",))
    return search, search.problem


@pytest.mark.parametrize("seed", range(8))
def test_no_row_says_more_than_the_peak(seed: int) -> None:
    """Every moment's row is at most the peak of every subset, whichever moments were learnt."""
    choose = random.Random(seed)
    model, given = small_network(seed, 8)
    trace = fl.trace(model, given)
    for method in ("freeze", "train-only"):
        planner = Planner(trace, dict.fromkeys(trace.parameters, 1.0), None, None, method, "tensor", "adamw")
        search, problem = rows_of(planner)
        chosen = [choose.randrange(1, 1 << len(problem.choices)) for _ in range(25)]
        for bits in chosen:
            learnt = search.peak.learn(search.problem, planner._cost(problem, bits).peak)
            search.problem = learnt or search.problem
        assert len(search.peak.figures) > 2
        reached = 0
        for bits in chosen:
            peak = planner._cost(problem, bits).peak
            rows = search.problem.assess(bits).amounts
            assert max(rows[figure] for figure in search.peak.figures) <= peak.nbytes
            if peak.phase == "forward":
                assert rows[f"peak_bytes at forward {peak.order}"] == peak.nbytes
                reached += 1
        assert reached or all(planner._cost(problem, bits).peak.phase != "forward" for bits in chosen)
