"""The step run as a whole: the same figures as asking call by call, both held to the real run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.cases import CASES, Case, build, subsets_for
from tests.truth.comparing import differences, trace_case
from tests.truth.reference import METHODS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

KINDS = (
    *("mlp", "tied_embedding", "hooks", "several_losses", "gradient_penalty", "constant_attribute", "resnet18"),
    *("checkpoint_nested_dropout", "checkpoint_reentrant_around_layers", "function_local_autograd", "custom_op"),
    *("forced_input_gradient", "llama_checkpointed", "lora_bert", "autocast_shared_weight", "complex_spectrum"),
    *("lstm_classifier", "writes_into_views", "data_decides_branch", "mixture_routed", "weight_norm_parametrization"),
)


@pytest.mark.parametrize("name", KINDS)
def test_a_step_run_as_a_whole_costs_what_the_real_run_does(name: str) -> None:
    if CASES[name].missing:
        pytest.skip(CASES[name].missing)
    case = CASES[name]()
    trace = trace_case(case)
    trace.entangled = "the test says so"
    subsets = list(subsets_for(case).values())
    chosen = (subsets[0], subsets[-1], subsets[len(subsets) // 2], subsets[-1])
    for train, method in zip(chosen, METHODS, strict=True):
        assert differences(trace, case, train, method) == {}, (train, method)


@pytest.mark.parametrize("name", ["mlp", "checkpoint_nested_dropout", "hooks", "gradient_penalty"])
def test_rows_of_a_step_run_as_a_whole_add_up(name: str) -> None:
    trace = trace_case(CASES[name]())
    trace.entangled = "the test says so"
    cost = trace.cost("@all", method="optimizer-only")
    assert cost.notes == ("run again as a whole for this subset: the test says so",)
    figures = ("forward_flops", "grad_input_flops", "grad_weight_flops", "recompute_flops", "saved_bytes")
    for rows in (cost.by_module(), cost.by_op(), cost.by_parameter()):
        for figure in (*figures, "gradient_bytes", "optimizer_bytes", "moved_bytes"):
            assert sum(getattr(row, figure) for row in rows) == getattr(cost, figure), figure


class Captures(nn.Module):
    """A reentrant checkpoint that uses an activation it is not given."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        captured = torch.tanh(self.a(x))
        given = self.b(x)
        return checkpoint(lambda y: self.c(y) * captured, given, use_reentrant=True).square().mean()


class Leaving(nn.Module):
    """A view made under no_grad keeps the graph of its base alive, which the loss does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.a(x)).exp()
        with torch.no_grad():
            rows = hidden[1:]
        return self.b(rows.requires_grad_()).square().mean()


class Twice(torch.autograd.Function):
    """Two times its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Handing(nn.Module):
    """A view of a weight made under no_grad requires grad as the weight does; a Function takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            row = self.a.weight[0]
        return (self.b(self.a(x)) * Twice.apply(row)).square().mean()


class Masked(nn.Module):
    """What a checkpoint runs again depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        return checkpoint(lambda y: self.b(y[y.detach().sum(-1) > 0]), hidden, use_reentrant=False).square().sum()


@pytest.mark.parametrize("kind", [Captures, Leaving, Handing, Masked])
def test_what_single_calls_cannot_tell_is_run_as_a_whole(kind: type[nn.Module]) -> None:
    case = build(lambda: Case(kind(), torch.randn(6, 4)))
    trace = trace_case(case)
    for train in subsets_for(case).values():
        for method in METHODS:
            assert differences(trace, case, train, method) == {}, (train, method)


def test_a_model_is_as_before_after_a_step_run_as_a_whole() -> None:
    case = CASES["batch_norm_cnn_train"]()
    before = {name: t.clone() for name, t in case.model.state_dict().items()}
    flags = [p.requires_grad for p in case.model.parameters()]
    trace = trace_case(case)
    trace.entangled = "the test says so"
    state = torch.random.get_rng_state()
    trace.cost("@all")
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(t, before[name]) for name, t in case.model.state_dict().items())
    assert [p.requires_grad for p in case.model.parameters()] == flags
    assert all(p.grad is None for p in case.model.parameters())


class IgnoresWhatAttended(nn.Module):
    """A reentrant checkpoint inside another, given an attention's result that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)
        self.head = nn.Linear(4, 2)
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unsqueeze(1).chunk(3, dim=-1)
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        y = self.head(x)

        def outer(scale: Tensor) -> Tensor:
            return checkpoint(lambda _y, _attended: scale.select(-1, 0), y, attended, use_reentrant=True)

        scale = checkpoint(outer, self.scale, use_reentrant=False, early_stop=False)
        return torch.addcmul(y, scale, scale).square().mean()


def test_what_a_fake_kernel_makes_of_an_undefined_gradient_is_not_believed() -> None:
    def build() -> Case:
        return Case(IgnoresWhatAttended(), torch.randn(2, 3, 4), rebuild=build)

    case = build()
    train = ["project.weight", "head.weight", "scale"]
    assert differences(trace_case(case), case, train, "freeze") == {}
