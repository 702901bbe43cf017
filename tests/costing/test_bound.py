"""The lower bound against what is known of each op, what is really needed, and what train-only keeps."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.cases import CASES
from tests.truth.comparing import trace_case
from torch import Tensor, nn

import frostline as fl
from frostline.costing.bound import kept

ELEMENTS = 4 * 16 * 32
FLOATS, BIT = 4 * ELEMENTS, ELEMENTS // 8


class _Op(nn.Module):
    """An op on the sum of a parameter and the input, so that nothing but the op keeps anything of it."""

    def __init__(self, op: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.op = op
        self.shift = nn.Parameter(torch.zeros(4, 16, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x + self.shift)


# what the gradient needs: one formula of calculus each (and what it is worth to store that)
NEEDS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "gelu": (F.gelu, FLOATS),
    "silu": (F.silu, FLOATS),
    "hardswish": (F.hardswish, FLOATS),
    "tanh": (torch.tanh, FLOATS),
    "exp": (torch.exp, FLOATS),
    "square": (torch.square, FLOATS),
    "softmax": (lambda x: x.softmax(-1), FLOATS),
    "layer_norm": (lambda x: F.layer_norm(x, (32,)), FLOATS + 2 * 4 * 64),
    "relu": (F.relu, BIT),
    "abs": (torch.abs, BIT),
    "clamp": (lambda x: x.clamp(-1, 1), BIT),
    "hardsigmoid": (F.hardsigmoid, BIT),
    "softshrink": (F.softshrink, BIT),
    "where": (lambda x: torch.where(x.detach() > 0, x, 0.0), BIT),
    "masked_fill": (lambda x: x.masked_fill(x.detach() > 0, 0.0), BIT),
    "tanh_of_a_row": (lambda x: x.tanh()[:, 0], FLOATS),
    "row_of_values": (lambda x: x[:, 0].tanh(), FLOATS // 16),
    "sum": (lambda x: x.sum(0), 0),
    "neg": (torch.neg, 0),
}


OVER = ["mnist_cnn", "bert_sdpa", "gpt2", "resnet18", "unet", "vit", "lstm_classifier", "gru_bidirectional", "many_ops"]


def bound(model: nn.Module, x: Tensor, train: object = "@all") -> fl.Cost:
    return fl.trace(model, x, loss="sum").cost(train, method="lower-bound")


@pytest.mark.parametrize("name", NEEDS)
def test_what_an_op_needs(name: str):
    op, expected = NEEDS[name]
    assert bound(_Op(op), torch.randn(4, 16, 32)).saved_bytes == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_in_other_dtypes(dtype: torch.dtype):
    size = torch.empty((), dtype=dtype).itemsize
    for op, expected in ((F.gelu, size * ELEMENTS), (torch.abs, BIT)):
        assert bound(_Op(op).to(dtype), torch.randn(4, 16, 32, dtype=dtype)).saved_bytes == expected


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x_BTD: Tensor) -> Tensor:
        q, k, v = (f(x_BTD).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v)


def test_attention_needs_no_values_and_no_result_where_only_values_train():
    """FACTS 2: q, k and the log-sum-exp; torch keeps v and the result too."""
    x, each = torch.randn(2, 16, 32), 4 * 2 * 16 * 32
    lse = 4 * 2 * 4 * 16
    cost = bound(_Attention(), x, "v.bias")
    assert cost.saved_bytes == 2 * each + lse
    assert cost.trace.cost("v.bias").saved_bytes == 4 * each + lse
    wasted = {(one.role, one.nbytes) for one in kept(cost) if not one.needed_bytes}
    assert wasted == {("input", each), ("output", each)}


@pytest.mark.parametrize("seed", range(3))
def test_contents_that_are_not_needed_may_be_anything(seed: int):
    """The whole step run for real, with what the bound leaves out overwritten before backward: the same gradients."""
    torch.manual_seed(seed)
    model, x = _Attention(), torch.randn(2, 16, 32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "v.weight")

    def gradient(overwrite: bool) -> Tensor:
        model.zero_grad()
        result = model(x)
        node = result.grad_fn
        if overwrite:
            for kept in (node._saved_value, node._saved_output):
                torch.empty(0).set_(kept.untyped_storage()).normal_()
        result.square().sum().detach()
        torch.autograd.backward(result, torch.ones_like(result))
        assert model.v.weight.grad is not None
        return model.v.weight.grad.clone()

    assert torch.equal(gradient(overwrite=True), gradient(overwrite=False))


@pytest.mark.parametrize(
    "name", ["mnist_cnn", "bert_sdpa", "gpt2", "resnet18", "unet", "vit", "lstm_classifier", "many_ops"]
)
def test_it_is_below_train_only_and_what_is_between_is_named(name: str):
    trace = trace_case(CASES[name]())
    names = list(trace.parameters)
    draw = random.Random(name)
    for chosen in (names, *(draw.sample(names, max(1, len(names) // 3)) for _ in range(3))):
        try:
            lean = trace.cost(chosen, method="train-only")
        except fl.FrostlineError:
            continue
        least = trace.cost(chosen, method="lower-bound")
        assert least.saved_bytes <= lean.saved_bytes
        assert least.step_flops == lean.step_flops
        if not trace.entangled:
            assert sum(one.nbytes - one.needed_bytes for one in kept(least)) == lean.saved_bytes - least.saved_bytes
        assert sum(row.saved_bytes for row in least.by_op()) == least.saved_bytes


def test_two_views_of_one_tensor_need_what_the_larger_needs():
    """Both halves may need the same numbers, for all that a bound knows."""

    class Halves(_Op):
        def forward(self, x: Tensor) -> Tensor:
            y = x + self.shift
            return y[:, :4].tanh().sum() + y[:, 2:10].square().sum() + y[:, :8].sin().sum()

    cost = bound(Halves(torch.neg), torch.randn(4, 16, 32))
    tanh = FLOATS // 4  # its result is its own
    assert cost.saved_bytes == FLOATS // 2 + tanh


def test_nothing_runs_it():
    model, x = nn.Linear(4, 2), torch.randn(3, 4)
    cost = fl.trace(model, x, loss="sum").cost(method="lower-bound")
    assert cost.step_seconds is None
    assert cost.basis["saved_bytes"].startswith("assumed")
    with pytest.raises(fl.FrostlineError, match="nothing runs 'lower-bound'"):
        fl.measure(model, x, "sum", train={"all": "@all"}, methods="lower-bound")


def test_the_report_says_what_is_beyond_it_and_what_most_is_needed_for():
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.Hardsigmoid(), nn.Linear(32, 2))
    text = str(
        fl.trace(model, torch.randn(8, 32), loss="sum").compare({"first": "0"}, methods=["train-only", "lower-bound"])
    )
    said = " ".join(text.split())
    assert "Beyond it: hardsigmoid input in 3, 24 %: 1 bit of an element would do" in said
    assert "most needed: gelu input in 1, 50 % of what is kept: its derivative needs it" in said
