"""Ops that return lists among their outputs, as cuDNN's backward of a recurrent layer does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.cases import Case, build
from tests.truth.comparing import differences, trace_case
from torch import Tensor, nn

import frostline as fl
from frostline.costing.formulas import unregister_flops

_library = torch.library.Library("nested_outputs", "DEF")
_library.define("backward(Tensor gradient, Tensor x, Tensor[] weights) -> (Tensor, Tensor[])")
_library.impl(
    "backward",
    lambda gradient, x, weights: (gradient * sum(weights), [(gradient * x).sum(0) for _ in weights]),
    "CompositeExplicitAutograd",
)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        return x * sum(weights)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, *weights = ctx.saved_tensors
        towards_x, towards_weights = torch.ops.nested_outputs.backward(gradient, x, weights)
        return towards_x, *towards_weights


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b = nn.Linear(3, 4), nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return _Scaled.apply(self.first(x), self.a, self.b)


@pytest.fixture
def _formula() -> Iterator[None]:
    op = torch.ops.nested_outputs.backward.default
    fl.register_flops(op)(lambda args, kwargs, outputs: (10, *(100 for _ in args[2])))
    yield
    unregister_flops(op)


@pytest.mark.usefixtures("_formula")
def test_each_tensor_of_a_list_is_an_output_of_its_own() -> None:
    case = build(lambda: Case(Scaled(), torch.randn(5, 3), lambda y: y.sum()))
    trace = trace_case(case)
    assert trace.cost("a").grad_weight_flops == 200
    for train in (["a"], ["b"], ["a", "b"], ["first.weight"], ["first.weight", "b"]):
        assert not differences(trace, case, train, "freeze"), train
