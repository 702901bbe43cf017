"""One parameter more, one less, and the few early ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import frostline as fl
from frostline.costing.marginal import early_parameters, marginal, order_of_use


def deep(num_layers: int = 6) -> fl.Trace:
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(num_layers)))
    return fl.trace(model, torch.randn(4, 32), loss=lambda out: out.sum())


ONE_MATMUL = 2 * 4 * 32 * 32


def test_dropping_saves_what_the_smaller_subset_does_not_cost() -> None:
    trace = deep()
    found = trace.marginal(["3", "5"])
    for change in found.dropping:
        rest = trace.cost([name for name in found.cost.subset.names if name != change.name])
        assert change.step_flops == found.cost.step_flops - rest.step_flops
        assert change.saved_bytes == found.cost.saved_bytes - rest.saved_bytes
        assert change.gradient_bytes == found.cost.gradient_bytes - rest.gradient_bytes
        assert change.optimizer_bytes == found.cost.optimizer_bytes - rest.optimizer_bytes


def test_adding_costs_what_the_larger_subset_costs_more() -> None:
    trace = deep()
    found = trace.marginal(["3", "5"])
    assert [change.name for change in found.adding] == [
        name for name in trace.parameters if name not in found.cost.subset
    ]
    for change in found.adding:
        more = trace.cost([*found.cost.subset.names, change.name])
        assert change.step_flops == more.step_flops - found.cost.step_flops
        assert change.saved_bytes == more.saved_bytes - found.cost.saved_bytes


def test_the_step_between_the_frost_line_and_a_parameter_is_on_its_bill() -> None:
    added = {change.name: change.step_flops for change in deep().marginal("3").adding}
    assert added["0.bias"] == 3 * ONE_MATMUL  # grad_input of layers 1, 2 and 3
    assert added["0.weight"] == 4 * ONE_MATMUL
    assert added["4.bias"] == 0


def test_dropping_the_only_parameter_leaves_the_forward() -> None:
    found = deep().marginal("3.weight")
    (change,) = found.dropping
    assert change.step_flops == found.cost.backward_flops
    assert change.saved_bytes == found.cost.saved_bytes


def test_few_early_parameters_that_cause_most_of_the_backward_are_found() -> None:
    trace = deep()
    found = trace.marginal(["0.bias", "5"])
    assert found.early is not None
    assert found.early.names == ("0.bias",)
    assert found.early.num_elements == 32
    assert found.early.step_flops == 5 * ONE_MATMUL  # grad_input of layers 1 to 5
    assert "freezing the 32 numbers of 0.bias would save 42 % of the step" in str(found)


def test_no_few_stand_out_where_all_cost_alike() -> None:
    assert early_parameters(deep().cost("@all")) is None
    assert "no few early parameters" in str(deep().marginal("@all"))


def test_parameters_are_ordered_by_use_not_by_registration() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(4, 2, bias=False)
            self.first = nn.Linear(4, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(x))

    trace = fl.trace(Backwards(), torch.randn(2, 4), loss=lambda out: out.sum())
    assert order_of_use(trace.cost("@all")) == ["first.weight", "last.weight"]


def test_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    marginal(deep(2), "1", progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_an_unknown_optimizer_is_an_error() -> None:
    with pytest.raises(fl.FrostlineError, match="adamx"):
        deep(2).marginal("1", optimizer="adamx")
