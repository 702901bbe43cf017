"""Peak memory, by the allocator's own events, against paper."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tests.measuring.networks import inputs, mlp, squares
from torch import Tensor, nn

from frostline.measuring.case import Case
from frostline.measuring.counting import count
from frostline.measuring.loop import Loop
from frostline.measuring.memory import Memory, measure_memory

LOSS = SEED = 4  # one number, and the gradient that backward starts from


def memory_of(loop: Loop, names: Sequence[str], method: str = "freeze", optimizer: str = "sgd") -> Memory:
    loop.arrange(Case(tuple(names), method, optimizer))
    for _ in range(2):
        loop.step(lambda phase, loss: None)
    found = measure_memory(loop, count(loop).other)
    assert found is not None
    return found


def total(outputs: Tensor) -> Tensor:
    return outputs.sum()


def test_every_event_of_one_linear_layer_is_what_paper_says():
    weight, x, y = 16 * 4 * 4, 8 * 16 * 4, 8 * 4 * 4
    memory = memory_of(Loop(nn.Linear(16, 4, bias=False), inputs(), total), ["weight"])
    forward = [0, y, y + LOSS, LOSS]  # the output is let go: the backward of a sum needs no values
    gradient = LOSS + SEED + weight
    backward = [LOSS + SEED, gradient, gradient + y, gradient, gradient - SEED]  # one y: the seed spread out for mm
    assert memory.timeline == (*forward, *backward, LOSS)
    assert memory.phase_ends == {"forward": 4, "backward": 9, "optimizer": 10}
    assert memory.at_loss_bytes == LOSS
    assert memory.peak_phase == "backward"
    assert memory.peak_bytes == weight + x + gradient + y == 1160


FIRST, SECOND, X, HIDDEN = 16 * 32 * 4, 32 * 4 * 4, 8 * 16 * 4, 8 * 32 * 4


def test_peak_of_an_mlp_is_exact():
    memory = memory_of(Loop(mlp(), inputs(), squares), ["0.weight", "2.weight"])
    # Before ReLU's backward: its output, the gradients of its output and its input; 2.weight has its gradient already.
    assert memory.peak_bytes == FIRST + SECOND + X + LOSS + SEED + SECOND + 3 * HIDDEN == 6664


def test_peak_of_a_frozen_mlp_is_its_forward():
    memory = memory_of(Loop(mlp(), inputs(), squares), ["2.weight"])
    assert memory.peak_phase == "forward"
    assert memory.peak_bytes == FIRST + SECOND + X + 2 * HIDDEN  # the hidden layer before ReLU and after


def test_gradients_that_nobody_clears_are_there_before_the_step():
    memory = memory_of(Loop(mlp(), inputs(), squares), ["2.weight"], "optimizer-only")
    assert memory.baseline_bytes["gradients"] == FIRST
    # As with everything trained, with the new gradient of 0.weight beside the one it is added to.
    assert memory.peak_bytes == 6664 + FIRST


def test_optimizer_state_is_there_before_the_step():
    memory = memory_of(Loop(mlp(), inputs(), squares), ["2.weight"], optimizer="adamw")
    assert memory.baseline_bytes["optimizer"] == 2 * SECOND + 4  # two moments and a step count


def test_buffers_and_targets_of_the_loss_are_there_before_the_step():
    target_BO = torch.randn(8, 4)
    model = nn.Sequential(nn.Linear(16, 4), nn.BatchNorm1d(4))
    memory = memory_of(Loop(model, inputs(), lambda y_BO: (y_BO - target_BO).square().sum()), ["0.weight"])
    assert memory.baseline_bytes["buffers"] == 2 * 4 * 4 + 8  # mean and variance, and how many batches there were
    assert memory.baseline_bytes["other"] == target_BO.nbytes


def test_what_a_step_replaces_is_taken_off_when_it_goes():
    class Remembers(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.last = x.detach().clone()  # replaces that of the step before
            return super().forward(x)

    memory = memory_of(Loop(Remembers(16, 4, bias=False), inputs(), total), ["weight"])
    assert memory.baseline_bytes["kept"] == X
    assert memory.timeline[1:3] == (X, 0)
    assert memory.timeline[-1] == LOSS


@pytest.mark.parametrize("method", ["freeze", "optimizer-only", "backward-inputs"])
def test_the_loss_returned_with_what_autograd_saved(method: str):
    loop = Loop(mlp(), inputs(), squares)
    memory = memory_of(loop, ["2.weight"], method)
    assert memory.at_loss_bytes == LOSS + HIDDEN + 8 * 4 * 4  # the hidden layer and the output
