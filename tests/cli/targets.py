"""Functions to name on a command line, good and bad."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

MODEL = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
NUMBER = 3


def total(outputs: Tensor) -> Tensor:
    return outputs.sum()


def mlp() -> tuple[nn.Module, Tensor, Any]:
    return MODEL, torch.randn(8, 16), total


def wide_mlp() -> tuple[nn.Module, Tensor, Any]:
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)), torch.randn(8, 16), total


def only_model() -> nn.Module:
    return MODEL


def scalar_model() -> nn.Module:
    class Scalar(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(16, 4)

        def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
            return self.inner(x).sum()

    return Scalar()


def tokens_model() -> nn.Module:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 8)
            self.head = nn.Linear(8, 2)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embed(tokens)).sum()

    return Tokens()


def no_loss() -> tuple[nn.Module, Tensor]:
    return MODEL, torch.randn(8, 16)


def not_a_scalar() -> tuple[nn.Module, Tensor, Any]:
    return MODEL, torch.randn(8, 16), lambda outputs: outputs.sum(1)


def needs_no_grad() -> tuple[nn.Module, Tensor, Any]:
    return MODEL, torch.randn(8, 16), lambda outputs: outputs.detach().sum()


def wrong_shape() -> tuple[nn.Module, Tensor, Any]:
    return MODEL, torch.randn(8, 15), total


def cut() -> tuple[nn.Module, Tensor, Any]:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.late = nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.late(self.early(x).detach())

    return Cut(), torch.randn(8, 16), total


def quantised() -> tuple[nn.Module, Tensor, Any]:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.packed = nn.Parameter(torch.ones(4, 16, dtype=torch.int8), requires_grad=False)
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.packed.to(x.dtype).t()) * self.scale

    return Quantised(), torch.randn(8, 16), total


def data_decides() -> tuple[nn.Module, Tensor, Any]:
    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            return y[y > 0] if bool((y.sum() > 0).item()) else y

    with torch.device("meta"):
        model = Decides()
    return model, torch.randn(8, 16), total


def a_number() -> int:
    return 3


def four_things() -> tuple[nn.Module, int, int, int]:
    return MODEL, 1, 2, 3


def raises() -> nn.Module:
    raise LookupError("the weights are gone")


def wants_an_argument(width: int) -> nn.Module:
    return nn.Linear(width, width)
