"""An optimizer's step over zeros: what a gradient holds is asked of the kernels that make it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import frostline as fl
from frostline.costing.optimizers import optimizer_model
from frostline.costing.overhead import Overhead
from frostline.costing.seconds import Clockwork
from frostline.probing.timings import Timings

ROWS, WIDTH, TOKENS = 4096, 128, 40


class Reads(nn.Module):
    """A table read by rows, and again by a head that is tied to it or is not."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(ROWS, WIDTH), nn.Linear(WIDTH, ROWS, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens)).logsumexp(-1)


@pytest.mark.parametrize("tied", [False, True])
def test_the_share_of_zeros_is_that_of_the_real_gradient(tied: bool):
    torch.manual_seed(0)
    model, tokens = Reads(tied=tied), torch.randperm(ROWS)[:TOKENS].view(4, -1)
    trace = fl.trace(model, tokens, loss="sum")
    clockwork = Clockwork(trace.cost("@all")._flags[0], Timings(torch.device("cpu")), Overhead(0.0, 0.0))
    model(tokens).sum().backward()
    for number, parameter in enumerate(trace.parameter_list):
        assert parameter.grad is not None
        share = (parameter.grad == 0).double().mean().item()
        assert clockwork._zeros(number, parameter) == (share if share > 0.01 else 0)  # (a sum may come to zero)
    assert ((model.table.weight.grad == 0).double().mean() > 0.9) == (not tied)


def test_a_step_over_zeros_is_timed_by_itself():
    """By an optimizer that takes its time over zeros."""

    class Slow(torch.optim.SGD):
        def step(self, closure: object = None) -> None:
            clock[0] += sum(5.0 if not group["params"][0].grad.any() else 1.0 for group in self.param_groups)

    clock = [0.0]
    timings = Timings(torch.device("cpu"), clock=lambda: clock[0])
    timings._disk = None
    timings.reference.look = lambda **_: 1.0  # type: ignore[method-assign]
    timings.reference.typical = lambda: 1.0  # type: ignore[method-assign]
    parameter = nn.Parameter(torch.zeros(ROWS, 8 * WIDTH))
    slow = optimizer_model(Slow)
    at_a_time = max(1, (32 << 20) // parameter.nbytes)
    for zeros, seconds in ((0.0, 1.0), (0.01, 1.0), (0.5, 3.0), (1.0, 5.0)):
        assert slow.step_timing(parameter, timings, zeros=zeros).seconds == pytest.approx(seconds / at_a_time)
