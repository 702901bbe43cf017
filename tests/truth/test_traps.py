"""Where the naive version goes wrong: one test a row of the design's table, each against a real run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.cases import CASES, build, subsets_for
from tests.cases import Case as ZooCase
from tests.truth.comparing import differences, trace_case
from tests.truth.reference import METHODS
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import frostline as fl


def assert_equals_the_real_run(case: ZooCase) -> fl.Trace:
    trace = trace_case(case)
    for train in subsets_for(case).values():
        for method in METHODS:
            assert differences(trace, case, train, method) == {}
    return trace


@pytest.mark.parametrize(
    "name",
    ["teacher_and_student", "writes_into_views", "in_place_activations", "fills_a_canvas", "multihead_attention"],
)
def test_flags_follow_autograds_edges_not_tensor_identity(name: str) -> None:
    assert_equals_the_real_run(CASES[name]())


@pytest.mark.parametrize(
    "name",
    [
        "function_with_weights",
        "function_reversible",
        "checkpoint_each_block",
        "checkpoint_reentrant_embedding",
        "checkpoint_without_early_stop",
    ],
)
def test_functions_and_checkpoints_are_replayed_as_calls(name: str) -> None:
    trace = assert_equals_the_real_run(CASES[name]())
    kinds = {unit.call.kind for unit in trace.graph.units}
    assert kinds & {"function", "checkpoint"}


def test_attention_with_a_learned_bias_changes_kernel_with_the_bias() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)
            self.bias = nn.Parameter(torch.randn(1, 2, 5, 5))  # of four dimensions, as the fused kernel wants it

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=self.bias).pow(2).mean()

    trace = assert_equals_the_real_run(build(lambda: ZooCase(Biased(), torch.randn(3, 5, 8))))
    assert "sequence" in {unit.call.kind for unit in trace.graph.units}  # its result is laid out otherwise, too
    fused, math = trace.cost(train="qkv").saved_bytes, trace.cost(train="@all").saved_bytes
    assert math > fused  # the math kernel keeps the attention weights


def test_matmul_folds_only_while_its_second_argument_trains() -> None:
    trace = assert_equals_the_real_run(CASES["matmul_4d_by_2d"]())
    assert "torch" in {unit.call.kind for unit in trace.graph.units}


def test_autocast_caches_the_casts_of_trainable_weights_only() -> None:
    class TwiceTheSameWeight(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.shared = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.shared(torch.tanh(self.shared(self.first(x)))).float().pow(2).mean()

    torch.manual_seed(0)
    case = build(lambda: ZooCase(TwiceTheSameWeight(), torch.randn(2, 4)))
    trace = assert_equals_the_real_run(case)
    # A cast of the weight is 4 * 4 * 2 = 32 bytes: one while it trains (cached), two while it is frozen.
    frozen = trace.cost(train="first.bias").saved_bytes
    trains = trace.cost(train=["first.bias", "shared.weight"]).saved_bytes
    activations_the_weight_reads = 2 * 4 * 2  # the input of its first use; tanh keeps its own output already
    assert frozen - trains == 32 - activations_the_weight_reads


@pytest.mark.parametrize("name", ["transformer_encoder_eval", "gradient_penalty"])
def test_a_step_that_depends_on_requires_grad_is_right_for_every_subset(name: str) -> None:
    assert_equals_the_real_run(CASES[name]())


def test_code_that_asks_for_requires_grad_is_run_as_a_whole_and_says_so() -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            if self.b.weight.requires_grad:  # what runs is decided in Python, outside any torch call
                y = y @ y.T @ y
            return self.b(y).sum()

    case = build(lambda: ZooCase(Careful(), torch.randn(5, 3)))
    trace = assert_equals_the_real_run(case)
    assert any("run again as a whole" in note for note in trace.cost(train="a.weight").notes)


def test_requires_grad_calls_on_activations_are_recorded() -> None:
    assert_equals_the_real_run(CASES["forced_input_gradient"]())


@pytest.mark.parametrize("name", ["lstm_classifier", "embedding_bag"])
def test_what_a_fake_kernel_does_not_save_is_confirmed_for_real(name: str) -> None:
    assert_equals_the_real_run(CASES[name]())


def test_outputs_without_a_gradient_are_part_of_the_probe() -> None:
    assert_equals_the_real_run(CASES["svd_values_only"]())


@pytest.mark.parametrize("name", ["data_decides_branch", "mixture_routed", "lstm_packed"])
def test_where_data_decides_one_real_forward_is_run_and_said(name: str) -> None:
    trace = assert_equals_the_real_run(CASES[name]())
    assert trace.forward == "real"
    assert any("real forward" in note for note in trace.notes)


def test_a_batch_that_decides_needs_no_weights() -> None:
    """Values that come from the inputs alone (a mask) are known, whatever the weights are."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            y = self.linear(x)
            return (y if mask.all() else y * mask[:, None]).sum()

    for values in ([True, True, True], [True, False, True]):
        case = build(lambda values=values: ZooCase(Masked(), (torch.randn(3, 4), torch.tensor(values))))
        assert assert_equals_the_real_run(case).forward == "fake"
    with torch.device("meta"):
        weightless = Masked()
    assert fl.trace(weightless, (torch.randn(3, 4), torch.ones(3, dtype=torch.bool))).cost("@all").saved_bytes == 48


def test_views_of_parameters_are_no_activations_casts_and_copies_are() -> None:
    class Transposed(nn.Module):
        def __init__(self, cast: bool) -> None:
            super().__init__()
            self.early, self.weight, self.cast = nn.Linear(4, 4), nn.Parameter(torch.ones(4, 4)), cast

        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight.double() if self.cast else self.weight
            return (self.early(x).to(weight.dtype) @ weight.t()).sum()

    plain = fl.trace(Transposed(cast=False), torch.randn(2, 4)).cost(train="early.bias")
    casts = fl.trace(Transposed(cast=True), torch.randn(2, 4)).cost(train="early.bias")
    assert plain.saved_bytes == 0  # the matmul keeps the weight alone, which is a parameter
    assert casts.saved_bytes == 4 * 4 * 8  # the float64 copy of it


def test_a_checkpoint_around_its_own_block_recomputes_the_block_once() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
            self.head = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = checkpoint(self.inner, x, use_reentrant=False)
            return functional.mse_loss(self.head(y), torch.zeros(8, 1))

    cost = fl.trace(Block(), torch.randn(8, 4)).cost("@all")
    # Early stop: the second linear keeps only its input and weight, so it is not run again.
    assert cost.recompute_flops == 2 * 8 * 4 * 4
    assert cost.backward_flops == cost.grad_input_flops + cost.grad_weight_flops + cost.recompute_flops


def test_a_checkpoint_is_held_by_the_outputs_that_the_loss_reaches_alone() -> None:
    """Of two outputs the loss reaches the one whose node saves nothing, so nothing holds the other's activations."""

    class TwoOutputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            def region(y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
                return torch.cat([y, y]), torch.tanh(y + z)

            joined, other = checkpoint(region, self.a(x), x * 2.5, use_reentrant=False)
            other.exp()
            return self.b(joined).square().mean()

    assert_equals_the_real_run(build(lambda: ZooCase(TwoOutputs(), torch.randn(5, 3))))


def test_a_checkpoint_that_no_gradient_comes_to_is_run_again_all_the_same() -> None:
    """Autograd's nodes unpack what they saved before they look whether a gradient came."""

    class Ignores(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(weight)
            return x @ weight

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
            return None, torch.ones_like(ctx.saved_tensors[0]) * grad.sum()

    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
            self.weight = nn.Parameter(torch.randn(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = checkpoint(self.inner, x, use_reentrant=False)
            loss: Tensor = Ignores.apply(y * 2.0, self.weight)  # type: ignore[no-untyped-call]
            return loss.sum()

    trace = assert_equals_the_real_run(build(lambda: ZooCase(Behind(), torch.randn(8, 4))))
    assert trace.cost("@all").recompute_flops > 0
