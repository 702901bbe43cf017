"""Costs side by side."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import frostline as fl
from frostline.costing.comparison import sweep_last
from frostline.costing.cost import RUN_METHODS


def trace_of(width: int = 32) -> fl.Trace:
    model = nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 4))
    return fl.trace(model, torch.randn(8, 16), loss=lambda out: out.sum())


def test_one_subset_is_compared_by_every_method() -> None:
    found = trace_of().compare("2")
    assert [label for label, _ in found] == list(RUN_METHODS)
    assert found["optimizer-only"].step_flops > found["freeze"].step_flops
    assert found.only_method == ""


def test_a_mapping_is_one_row_a_subset() -> None:
    found = trace_of().compare({"head": "2", "all": "*"})
    assert [label for label, _ in found] == ["head", "all"]
    assert found["head"] == trace_of().cost("2")
    assert found.only_method == "freeze"


def test_a_mapping_by_several_methods_names_both() -> None:
    found = trace_of().compare({"head": "2", "all": "*"}, methods=["freeze", "optimizer-only"])
    assert [label for label, _ in found] == [
        "head by freeze", "head by optimizer-only", "all by freeze", "all by optimizer-only",
    ]  # fmt: skip


def test_a_label_that_is_not_there_is_named() -> None:
    with pytest.raises(KeyError, match=r"'tail'.*'head'"):
        trace_of().compare({"head": "2"})["tail"]


def test_models_are_compared_by_their_own_full_step() -> None:
    small, large = trace_of(32), trace_of(64)
    found = fl.compare({"small": small.cost("2"), "large": large.cost("2")})
    assert found.traces == (small, large)
    assert "each row's own model" in str(found)
    assert found.to_dict()["rows"][1]["model"] == 1


@pytest.mark.parametrize(("costs", "message"), [({}, "no costs"), ([1], "takes a mapping"), ({"a": 1}, "'a' is int")])
def test_compare_says_what_it_takes(costs: object, message: str) -> None:
    with pytest.raises(fl.FrostlineError, match=message):
        fl.compare(costs)  # type: ignore[arg-type]


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(fl.FrostlineError, match="no method 'thaw'"):
        trace_of().compare("2", methods="thaw")


def test_the_sweep_grows_with_the_number_of_blocks() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)), nn.Linear(4, 2))
    points = sweep_last(fl.trace(model, torch.randn(2, 4), loss=lambda out: out.sum()))
    assert [count for count, _ in points] == list(range(len(points)))
    flops = [cost.step_flops for _, cost in points]
    assert flops == sorted(flops)
    assert points[-1][1].step_flops == points[-1][1].full.step_flops
