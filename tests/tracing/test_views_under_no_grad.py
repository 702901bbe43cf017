"""A view whose base was written to under no_grad keeps its gradient while it is watched, as it does in torch."""

from __future__ import annotations

from typing import Any

import torch
from tests.cases import Case
from tests.truth.comparing import differences, trace_case
from torch import Tensor, nn
from torch.nn import functional


class Doubled(torch.autograd.Function):
    """Changes its argument in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class WrittenTo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 16))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.linear(x, self.weight).transpose(0, -1)
        with torch.no_grad():
            Doubled.apply(y)  # type: ignore[no-untyped-call]
        return y.float().mean()


def test_a_view_changed_under_no_grad_keeps_its_gradient() -> None:
    def build() -> Case:
        return Case(WrittenTo(), torch.ones(16), rebuild=build)

    case = build()
    trace = trace_case(case)
    assert trace.cost("weight").gradient_bytes == 2 * 16 * 4
    assert differences(trace, case, ["weight"], "freeze") == {}
