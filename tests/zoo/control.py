"""Steps with a will of their own: branches, detached parts, several losses, gradients inside the step."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from tests.cases import Case, case
from tests.zoo.dense import mean_square
from torch import Tensor, nn
from torch.nn import functional


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positive, self.negative, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.positive(x) if x.sum() > 0 else self.negative(x)
        if y.abs().max().item() > 0.1:
            y = y * y.std().item()
        return self.head(y)


@case(data_decides=True)
def data_decides_branch() -> Case:
    return Case(Branches(), torch.randn(3, 4), mean_square)


class UnusedParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.only_data = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.used(x))
        return self.head(y + functional.linear(y, self.only_data.weight.data))


@case()
def unused_parameters() -> Case:
    return Case(UnusedParameters(), torch.randn(3, 4), mean_square)


class TeacherAndStudent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.teacher = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        self.student = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
        self.critic = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.embed(x)
        with torch.no_grad():
            target = self.teacher(x)
        guess = self.student(x)
        return target, guess, self.critic(guess.detach())


@case()
def teacher_and_student() -> Case:
    def loss(outputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        target, guess, value = outputs
        return functional.kl_div(guess.log_softmax(-1), target.softmax(-1), reduction="batchmean") + value.mean()

    return Case(TeacherAndStudent(), torch.randn(3, 4), loss)


class Heads(nn.Module):
    """Returns a mapping; two of its heads are not in the loss, one of them detached."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.heads = nn.ModuleDict({name: nn.Linear(6, 2) for name in ("main", "side", "detached")})

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = torch.relu(self.body(x))
        return {"main": self.heads["main"](y), "rest": [self.heads["side"](y), self.heads["detached"](y.detach())]}


@case()
def heads_outside_the_loss() -> Case:
    return Case(Heads(), torch.randn(3, 4), lambda out: out["main"].square().mean())


@dataclass
class Outputs:
    logits: Tensor
    pair: tuple[Tensor, Tensor]


class ReturnsDataclass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> Outputs:
        y = functional.gelu(self.a(x)) * scale
        if mask is not None:
            y = y * mask
        return Outputs(self.b(y), (self.c(y), y.mean(-1)))


@case()
def several_losses() -> Case:
    labels = torch.tensor([0, 2, 1])

    def loss(out: Outputs) -> Tensor:
        return (
            functional.cross_entropy(out.logits, labels)
            + 0.5 * functional.smooth_l1_loss(out.pair[0], torch.zeros(3, 3))
            + out.pair[1].abs().sum()
        )

    inputs = {"x": torch.randn(3, 4), "scale": 2.0, "mask": torch.ones(3, 6)}
    return Case(ReturnsDataclass(), inputs, loss)


@case()
def weight_decay_in_the_loss() -> Case:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randn(3, 4)

    def step(model: nn.Module) -> Tensor:
        gram = model[0].weight @ model[0].weight.T
        return model(x).square().mean() + 0.1 * (gram - torch.eye(6)).square().sum()

    return Case(model, step=step)


@case()
def gradient_penalty() -> Case:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Softplus(), nn.Linear(6, 1))
    x = torch.randn(3, 4)

    def step(model: nn.Module) -> Tensor:
        inputs = x.clone().requires_grad_()
        score = model(inputs).sum()
        (slope,) = torch.autograd.grad(score, inputs, create_graph=True)
        return score + (slope.norm(dim=1) - 1).square().mean()

    return Case(model, step=step)


@case()
def two_passes() -> Case:
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3))
    x = torch.randn(5, 4)

    def step(model: nn.Module) -> Tensor:
        return functional.mse_loss(model(x), model(x + 0.1).detach()) + model(x.flip(0)).mean()

    return Case(model, step=step)


class HoldsATensor(nn.Module):
    """A tensor attribute that is neither parameter nor buffer, and one that the forward leaves behind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
        self.scale = torch.linspace(0.5, 1.5, 6)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = torch.cat([self.a(x)] * 3)
        return self.b(self.a(x) * self.scale + torch.tensor(0.5))


@case()
def constant_attribute() -> Case:
    return Case(HoldsATensor(), torch.randn(3, 4), mean_square)


class ScalesItsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.weight = nn.Linear(4, 6), nn.Parameter(torch.randn(6, 6))
        self.register_buffer("mask", torch.ones(6, 6).tril())
        self.noise, self.b = nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        masked = (self.weight * self.mask * 0.5) @ self.mask  # from a parameter and constants: weight side
        noisy = (self.noise * torch.rand(6, 6)) @ self.mask  # random numbers are data
        return self.b(self.a(x) @ masked @ noisy)


@case()
def masked_and_noisy_weights() -> Case:
    return Case(ScalesItsWeight(), torch.randn(3, 4), mean_square)


@case()
def input_requires_grad() -> Case:
    return Case(
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(3, 4, requires_grad=True), mean_square
    )


class ForcesInputGradient(nn.Module):
    """What ``enable_input_require_grads`` does: the embedding's output is made to require grad."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x.requires_grad_()
        return self.head(torch.tanh(self.body(x)))


@case()
def forced_input_gradient() -> Case:
    return Case(ForcesInputGradient(), torch.randint(0, 9, (2, 4)), mean_square)


class Hooked(nn.Module):
    """Module hooks and a tensor hook, which run in the forward and in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
        self.a.register_full_backward_hook(lambda module, grad_input, grad_output: None)
        self.b.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        if y.requires_grad:
            y.register_hook(lambda grad: grad * 2)
        return self.b(y)


@case()
def hooks() -> Case:
    return Case(Hooked(), torch.randn(3, 4), mean_square)


@case()
def autoencoder_of_its_input() -> Case:
    """The loss's closure holds the very tensor that the model is given."""
    x = torch.rand(4, 6)
    return Case(nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 6)), x, lambda out: functional.mse_loss(out, x))


@case()
def next_token_from_one_batch() -> Case:
    """Inputs and targets are views of one batch: one storage is kept, not two."""
    ids = torch.randint(0, 16, (2, 12))
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16))
    return Case(model, ids[:, :-1], lambda out: functional.cross_entropy(out.transpose(1, 2), ids[:, 1:]))


@case()
def forward_mode_inside() -> Case:
    """A Jacobian-vector product by forward-mode differentiation, then a backward through it."""
    x, v = torch.randn(5, 3), torch.randn(5, 3)

    def step(model: nn.Module) -> Tensor:
        with warnings.catch_warnings():  # torch's own, about how it decomposes forward-mode derivatives
            warnings.simplefilter("ignore", DeprecationWarning)
            y, tangent = torch.func.jvp(model, (x,), (v,))
        return y.square().mean() + tangent.square().mean()

    return Case(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), step=step)
