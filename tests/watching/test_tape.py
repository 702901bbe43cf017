"""What is recorded of a step is enough to run it again, and holds no more than it must."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import frostline as fl
from frostline.watching.steps import Steps


def test_a_replay_gives_the_loss_and_the_gradients_of_the_step() -> None:
    torch.manual_seed(0)
    model, weights = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.rand(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    inputs, labels = torch.randn(5, 6), torch.randint(3, (5,))
    with fl.watch() as seen:
        out = model(inputs)
        scaled = out * weights
        scaled[:, 0] = scaled[:, 0] * 2
        loss = (F.cross_entropy(scaled, labels) + out.pow(2).mean()) / 2
        loss.backward()
        optimizer.step()
    replay = seen.record.passes[0].replay
    assert replay is not None
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.zero_grad()
    again = replay.run()
    again.backward()
    assert torch.equal(again, loss)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), wanted, strict=True) if p.grad is not None)
    assert torch.equal(replay.loss(model(inputs)), loss)


def test_gradients_given_to_backward_are_part_of_it() -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    weights = torch.randn(2, 3)
    with fl.watch() as seen:
        model(torch.ones(2, 4)).backward(weights)
        optimizer.step()
    replay = seen.record.passes[0].replay
    assert replay is not None
    assert torch.equal(replay.run(), (model(torch.ones(2, 4)) * weights).sum())


def test_an_evaluation_keeps_no_batches_and_a_step_no_graph() -> None:
    model = nn.Linear(4, 3)
    batches: list[weakref.ref[Tensor]] = []
    with fl.watch() as seen, torch.no_grad():
        for _ in range(10):
            batch = torch.randn(2, 4)
            batches.append(weakref.ref(batch))
            out = model(batch)
        del batch, out
        gc.collect()
        model(torch.randn(2, 4))
        assert sum(each() is not None for each in batches) <= 1
    assert seen.record.num_passes == 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step() -> weakref.ref[Tensor]:
        loss = model(torch.randn(2, 4)).sum()
        loss.backward()
        optimizer.step()
        return weakref.ref(loss)

    with fl.watch() as seen:
        graph = step()
        gc.collect()
        assert graph() is None
    assert seen.now is not None


def test_modules_are_traced_as_they_were_in_the_step_and_left_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    with fl.watch() as seen:
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
        model[1] = nn.Identity()
        model.eval()
    after: dict[str, Any] = dict(model.named_modules())
    usual = Steps(seen.record).usual()
    assert usual is not None
    assert dict(usual.trace.modes) == {"": True, "0": True, "1": True, "2": True}
    assert dict(model.named_modules()) == after
    assert not model.training


def test_a_loss_that_was_not_seen_is_said_and_has_no_figures() -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    early = (model.weight * 2).sum()
    with fl.watch() as seen:
        early.backward()
        optimizer.step()
    assert seen.now is None
    assert seen.record.passes[0].unrecorded


def test_a_policy_that_returns_a_distribution_is_costed_with_all_its_heads() -> None:
    torch.manual_seed(0)
    body, policy, value = nn.Linear(4, 32), nn.Linear(32, 3), nn.Linear(32, 1)

    class Actor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.policy, self.value = body, policy, value

        def forward(self, x: Tensor) -> tuple[torch.distributions.Categorical, Tensor]:
            hidden = self.body(x).tanh()
            return torch.distributions.Categorical(logits=self.policy(hidden)), self.value(hidden)

    net = Actor()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with fl.watch() as seen:
        chosen, worth = net(torch.randn(8, 4))
        actions = chosen.sample()
        loss = -(chosen.log_prob(actions) * worth.detach()).mean() + worth.pow(2).mean() - chosen.entropy().mean()
        loss.backward()
        optimizer.step()
    # On paper, a row: 4 x 32, 32 x 3 and 32 x 1; grad_weight of all, grad_input of the two heads.
    assert seen.now is not None
    assert seen.now.forward_flops == 2 * 8 * (128 + 96 + 32)
    assert seen.now.backward_flops == 2 * 8 * (128 + 96 + 32 + 96 + 32)


def test_a_step_of_which_a_part_was_not_seen_has_no_figures() -> None:
    """An autograd.Function that is applied outside of any module hides what made its input."""

    class Reverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            return -gradients[0]

    features, domain = nn.Linear(6, 8), nn.Linear(8, 2)
    optimizer = torch.optim.SGD([*features.parameters(), *domain.parameters()], lr=0.1)
    with fl.watch() as seen:
        domain(Reverse.apply(features(torch.randn(4, 6)))).sum().backward()
        optimizer.step()
    assert seen.now is None
    assert seen.findings == ()
    assert seen.record.passes[0].unrecorded


def test_what_no_gradient_comes_of_does_not_pile_up_in_metrics() -> None:
    model, right = nn.Linear(4, 3), torch.zeros(())
    batches: list[weakref.ref[Tensor]] = []
    with fl.watch():
        for _ in range(40):
            batch = torch.randn(2, 4)
            batches.append(weakref.ref(batch))
            with torch.no_grad():
                right += (model(batch).argmax(1) == 0).sum()
            del batch
        gc.collect()
        assert sum(each() is not None for each in batches) <= 10
