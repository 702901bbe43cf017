"""Plans within a time: the program's seconds are those of the cost, and no subset within the budget is worth more."""

from __future__ import annotations

import random

import pytest
import torch
from tests.planning.brute_force import best_within, every_subset
from tests.planning.small_networks import small_network
from torch import nn

import frostline as fl
from frostline.planning.plan import Planner


@pytest.mark.parametrize("seed", range(3))
def test_a_plan_within_a_time_is_the_best_there_is(seed: int) -> None:
    choose = random.Random(f"seconds {seed}")
    model, given = small_network(seed, 7)
    trace = fl.trace(model, given)
    trace.calibrate()
    method = choose.choice(["freeze", "train-only"])
    importance = {name: choose.random() ** 2 for name in trace.parameters}
    tried = every_subset(trace, importance, method, ["step_seconds", "saved_bytes"])
    for figures in (["step_seconds"], ["step_seconds", "saved_bytes"]):
        limits = {figure: choose.choice(tried).figures[figure] for figure in figures}
        best = best_within(tried, limits)
        if best is None:
            continue
        plan = fl.plan(trace, limits, importance, method=method, time_limit=30)
        assert plan.objective == pytest.approx(best.worth)
        assert plan.cost.step_seconds is not None
        assert plan.cost.step_seconds <= limits["step_seconds"]
        assert plan.gap == 0


def test_the_largest_blocks_are_counted_as_the_cost_counts_them() -> None:
    """Memory from the system is paid for the largest trained tensor alone: no sum over parameters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 500), nn.ReLU(), nn.Linear(500, 400), nn.ReLU(), nn.Linear(400, 8))
    trace = fl.trace(model, torch.randn(2, 8), lambda y: y.sum())
    trace.calibrate()
    planner = Planner(trace, dict.fromkeys(trace.parameters, 1.0), None, None, "freeze", "tensor", "adamw")
    problem = planner.search(("step_seconds",)).problem
    assert len({size for size, _, _ in problem.largest["step_seconds"]}) > 1
    for bits in range(1, 1 << len(problem.choices)):
        seconds = planner._cost(problem, bits).step_seconds
        assert problem.assess(bits).amounts["step_seconds"] == pytest.approx(seconds, rel=1e-9)


def test_seconds_have_to_be_known_first() -> None:
    model, given = small_network(1)
    trace = fl.trace(model, given)
    with pytest.raises(fl.FrostlineError, match=r"call trace.calibrate\(\) first"):
        fl.plan(trace, {"step_seconds": "50%"}, dict.fromkeys(trace.parameters, 1.0))
