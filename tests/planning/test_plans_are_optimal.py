"""Plans against every subset there is, costed one by one.

``FROSTLINE_PLANS=1000`` draws as many networks; 60 otherwise.
"""

from __future__ import annotations

import os
import random

import pytest
from tests.planning.brute_force import EXACT, best_within, every_subset
from tests.planning.small_networks import small_network

import frostline as fl

COUNT = int(os.environ.get("FROSTLINE_PLANS", "60"))


@pytest.mark.parametrize("seed", range(COUNT))
def test_no_subset_within_the_budget_is_worth_more(seed: int) -> None:
    choose = random.Random(f"plan {seed}")
    model, given = small_network(seed)
    try:
        trace = fl.trace(model, given)
    except fl.FrostlineError as error:
        pytest.skip(f"nothing to train: {error}")
    method = choose.choice(["freeze", "train-only"])
    kind = choose.choice(["float", "small", "equal"])
    importance = {
        name: {"float": choose.random() ** 3, "small": float(choose.randint(0, 3)), "equal": 1.0}[kind]
        for name in trace.parameters
    }
    tried = every_subset(trace, importance, method)
    for count in (1, 1, 2, 3):
        figures = choose.sample(EXACT, count)
        # Exactly what some subset takes, or a little less: where a limit cuts closest.
        limits = {f: max(1, choose.choice(tried).figures[f] - choose.choice([0, 0, 0, 1])) for f in figures}
        best = best_within(tried, limits)
        if best is None:
            with pytest.raises(fl.FrostlineError, match=r"no subset meets the budget: .*give at least that"):
                fl.plan(trace, limits, importance, method=method)
            continue
        plan = fl.plan(trace, limits, importance, method=method, time_limit=60)
        assert plan.objective == pytest.approx(best.worth, rel=1e-9), (limits, best, plan.subset.names)
        assert plan.gap == 0
        cost = trace.cost(list(plan.subset.names), method=method)
        for figure, limit in limits.items():
            assert (cost.num_trained if figure == "trainable_parameters" else getattr(cost, figure)) <= limit
        won = sum(importance[name] for name in plan.subset.names if name not in cost.unreached)
        assert won == pytest.approx(plan.objective)
