"""Every exact figure, equal to what torch really did: every model of the zoo, at least 12 subsets, every method."""

from __future__ import annotations

import pytest
from tests.cases import CASES, DEVICE, subsets_for
from tests.truth.comparing import differences, trace_case
from tests.truth.reference import METHODS

# Each subset is a run of the whole step: Python code asks for requires_grad, a cached cast or a tangent lies inside a
# call, or a checkpoint inside another.
RUN_AS_A_WHOLE = {
    *("transformer_encoder_eval", "hooks", "autocast_cast_inside_a_call", "forward_mode_inside"),
    "checkpoint_nested_dropout",
}


@pytest.mark.parametrize("name", CASES)
def test_every_figure_equals_the_real_run(name: str) -> None:
    if CASES[name].missing:
        pytest.skip(CASES[name].missing)
    case = CASES[name]()
    trace = trace_case(case)
    wrong = {
        (label, method): found
        for label, train in subsets_for(case).items()
        for method in METHODS
        if (found := differences(trace, case, train, method))
    }
    assert not wrong, f"{len(wrong)} differ, the first: {next(iter(wrong.items()))}"
    if DEVICE == "cpu":  # (one of them is about the CPU's autocast)
        assert bool(trace.entangled) == (name in RUN_AS_A_WHOLE), trace.entangled


def test_the_comparison_can_fail() -> None:
    case = CASES["mlp"]()
    trace = trace_case(case)
    wrong_case = CASES["linear_10_20_10_5"]()
    name = next(iter(trace.parameters))
    assert differences(trace, wrong_case, [name], "freeze") != {}
