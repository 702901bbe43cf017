"""Rows of a breakdown: whose figure is whose, and that they add up exactly."""

from __future__ import annotations

import pytest
import torch
from tests.cases import CASES, subsets_for
from torch import nn
from torch.utils.checkpoint import checkpoint

import frostline as fl
from frostline.costing import breakdown
from frostline.costing.breakdown import FORWARD, GRAD_INPUT, RECOMPUTE, Row
from frostline.costing.cost import METHODS, Cost

SHARED = "forward_flops grad_input_flops grad_weight_flops recompute_flops saved_bytes gradient_bytes optimizer_bytes"
FIGURES = (*SHARED.split(), "moved_bytes")
ADDED_UP = (
    "mlp", "tied_embedding", "shared_layer_thrice", "sparse_embedding", "weight_norm_parametrization", "hypernetwork",
    "attention_learned_bias", "checkpoint_each_block", "checkpoint_reentrant_cut", "several_losses",
    "batch_norm_cnn_train", "function_with_weights", "custom_op", "autocast_shared_weight", "lstm_classifier",
    "in_place_activations", "teacher_and_student", "forced_input_gradient", "input_requires_grad",
)  # fmt: skip


def assert_adds_up(rows: list[Row], cost: Cost) -> None:
    """Every figure of ``cost`` is the sum of its rows."""
    for figure in FIGURES:
        assert sum(getattr(row, figure) for row in rows) == (getattr(cost, figure) or 0), figure


def mlp() -> fl.Trace:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    return fl.trace(model, torch.randn(8, 16), loss=lambda out: out.sum())


def named(rows: list[Row]) -> dict[str, Row]:
    found = {row.name: row for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ADDED_UP)
def test_rows_add_up_to_the_totals(name: str, method: str) -> None:
    case = CASES[name]()
    trace = fl.trace(case.model, step=case.step) if case.step else fl.trace(case.model, case.inputs, case.loss)
    for subset in list(subsets_for(case).values())[:4]:
        try:
            cost = trace.cost(subset, method=method)
        except fl.FrostlineError:
            continue
        for rows in (cost.by_module(1), cost.by_module(3), cost.by_op(), cost.by_parameter()):
            assert_adds_up(rows, cost)


def test_assert_adds_up_fails_when_a_row_is_missing() -> None:
    cost = mlp().cost("@all")
    with pytest.raises(AssertionError):
        assert_adds_up(cost.by_module()[1:], cost)


def test_by_module_charges_each_linear_its_own_matmuls() -> None:
    rows = named(mlp().cost("@all").by_module())
    assert rows["0"].forward_flops == 2 * 8 * 16 * 32
    assert rows["0"].grad_input_flops == 0  # nothing before it trains
    assert rows["0"].grad_weight_flops == 2 * 8 * 16 * 32
    assert rows["2"].grad_input_flops == 2 * 8 * 32 * 4
    assert rows["2"].gradient_bytes == 4 * (32 * 4 + 4)
    assert rows["0"].saved_bytes == 8 * 16 * 4  # its input
    assert rows["1"].saved_bytes == 8 * 32 * 4  # relu's output, which the second linear needs too


def test_by_module_keeps_depth_names() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2))
    cost = fl.trace(model, torch.randn(1, 2), loss=lambda out: out.sum()).cost("@all")
    assert [row.name for row in cost.by_module(1)] == ["0", "1", breakdown.TOP_LEVEL]
    assert [row.name for row in cost.by_module(2)] == ["0.0", "0.1", "1", breakdown.TOP_LEVEL]


def test_depth_must_be_positive() -> None:
    with pytest.raises(ValueError, match="1 or more"):
        mlp().cost("@all").by_module(0)


def test_by_op_puts_the_dearest_first_with_its_gradients() -> None:
    first = mlp().cost("@all").by_op()[0]
    assert first.name == "aten.addmm.default"
    assert first.num_calls == 2
    assert first.gradient_bytes == 4 * 676


def test_by_parameter_parts_what_is_shared_from_what_is_not() -> None:
    rows = named(mlp().cost("0").by_parameter())
    assert rows["0.weight"].grad_weight_flops == 2 * 8 * 16 * 32
    assert rows["0.bias"].grad_weight_flops == 0  # a sum is free
    assert rows["0.bias"].gradient_bytes == 32 * 4
    assert rows[GRAD_INPUT].grad_input_flops == 2 * 8 * 32 * 4  # through the second linear, for both
    assert rows[FORWARD].forward_flops == 2 * 8 * (16 * 32 + 32 * 4)
    assert RECOMPUTE not in rows


def test_by_parameter_shows_gradients_that_nothing_uses() -> None:
    rows = named(mlp().cost("2", method="optimizer-only").by_parameter())
    assert rows["0.weight"].gradient_bytes == 16 * 32 * 4
    assert rows["0.weight"].optimizer_bytes == 0
    assert rows["0.weight"].num_trained == 0


def test_a_tensor_made_from_two_parameters_is_their_joint_row() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.randn(4, 3))
            self.b = nn.Parameter(torch.randn(4, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.a * self.b)

    trace = fl.trace(Product(), torch.randn(5, 4), loss=lambda out: out.sum())
    cost = trace.cost("@all")
    rows = named(cost.by_parameter())
    assert rows["a + b"].grad_weight_flops == 2 * 5 * 4 * 3
    assert_adds_up(list(rows.values()), cost)
    assert named(trace.cost("a").by_parameter())["a"].grad_weight_flops == 2 * 5 * 4 * 3


def test_recompute_is_a_row_and_a_region_counts_for_its_module() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
            self.head = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(checkpoint(self.block, x, use_reentrant=False))

    trace = fl.trace(Checkpointed(), torch.randn(3, 4), loss=lambda out: out.sum())
    cost = trace.cost("@all")
    assert named(cost.by_parameter())[RECOMPUTE].recompute_flops == cost.recompute_flops > 0
    assert named(cost.by_module(1))["block"].recompute_flops == cost.recompute_flops
    grad_weight = {row.name: row.grad_weight_flops for row in cost.by_parameter() if row.grad_weight_flops}
    assert grad_weight == {"block.0.weight": 192, "block.2.weight": 192, "head.weight": 48}
