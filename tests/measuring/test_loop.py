"""What each method's loop does to flags, gradients and weights."""

from __future__ import annotations

import pytest
import torch
from tests.measuring.networks import inputs, mlp, squares
from torch import nn

from frostline.errors import FrostlineError, OptimizerError, TraceError
from frostline.measuring.case import Case
from frostline.measuring.loop import Loop


def loop_after_two_steps(method: str) -> Loop:
    loop = Loop(mlp(), inputs(), squares)
    loop.arrange(Case(("2.weight",), method))
    for _ in range(2):
        loop.step(lambda phase, loss: None)
    return loop


def test_freeze_leaves_flags_to_the_subset_alone():
    loop = loop_after_two_steps("freeze")
    assert [p.requires_grad for p in loop.model.parameters()] == [False, True]
    assert [p.grad for p in loop.model.parameters()] == [None, None]


def test_optimizer_only_lets_gradients_of_the_rest_pile_up():
    loop = loop_after_two_steps("optimizer-only")
    rest, subset = loop.model.parameters()
    assert subset.grad is None
    assert rest.grad is not None
    before = rest.grad.clone()
    loop.step(lambda phase, loss: None)
    assert torch.allclose(rest.grad, before * 3 / 2)


def test_backward_inputs_gives_the_rest_no_gradient():
    loop = loop_after_two_steps("backward-inputs")
    assert [p.requires_grad for p in loop.model.parameters()] == [True, True]
    assert [p.grad for p in loop.model.parameters()] == [None, None]


def test_weights_stay_as_they_are_so_that_every_step_is_the_same():
    loop = Loop(mlp(), inputs(), squares)
    before = [p.detach().clone() for p in loop.model.parameters()]
    loop.arrange(Case(("0.weight", "2.weight")))
    loop.step(lambda phase, loss: None)
    assert all(torch.equal(p, b) for p, b in zip(loop.model.parameters(), before, strict=True))
    assert len(loop.optimizer.state) == 2


def test_another_case_starts_without_gradients_and_states_of_the_one_before():
    loop = loop_after_two_steps("optimizer-only")
    loop.arrange(Case(("0.weight",)))
    assert [p.grad for p in loop.model.parameters()] == [None, None]
    assert len(loop.optimizer.state) == 0


def test_what_cannot_be_run_is_refused():
    with pytest.raises(FrostlineError, match=r"'weight' is on meta"):
        Loop(nn.Linear(16, 4, device="meta"), inputs(), squares)
    loop = Loop(mlp(), inputs(), squares)
    with pytest.raises(FrostlineError, match=r"no parameter '1\.weight'"):
        loop.arrange(Case(("1.weight",)))
    with pytest.raises(OptimizerError, match="no optimizer 'adamm'"):
        loop.arrange(Case(("2.weight",), "freeze", "adamm"))
    with pytest.raises(FrostlineError, match="no method 'frozen'"):
        Case(("2.weight",), "frozen")
    loop = Loop(mlp(), inputs(), None)
    loop.arrange(Case(("2.weight",)))
    with pytest.raises(TraceError, match="not a scalar loss"):
        loop.step(lambda phase, loss: None)
