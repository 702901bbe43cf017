"""Activation checkpointing, both kinds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tests.cases import Case, case
from tests.zoo.attention import Block
from tests.zoo.dense import mean_square
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint, checkpoint_sequential


class Checkpointed(nn.Module):
    """Blocks, each under its own checkpoint; an embedding before them or nothing."""

    def __init__(self, blocks: list[nn.Module], *, use_reentrant: bool, entry: nn.Module | None = None) -> None:
        super().__init__()
        self.entry = entry
        self.blocks = nn.ModuleList(blocks)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.entry is not None:
            x = self.entry(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return x


def mlp_blocks(count: int = 3, width: int = 8, dropout: float = 0.0) -> list[nn.Module]:
    return [
        nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(2 * width, width))
        for _ in range(count)
    ]


@case()
def checkpoint_each_block() -> Case:
    return Case(Checkpointed(mlp_blocks(), use_reentrant=False), torch.randn(4, 8), mean_square)


@case()
def checkpoint_attention_blocks() -> Case:
    model = Checkpointed([Block(causal=True), Block(bias=True)], use_reentrant=False, entry=nn.Linear(6, 8))
    return Case(model, torch.randn(2, 5, 6), mean_square)


@case()
def checkpoint_reentrant_cut() -> Case:
    # The first block's input requires no grad, so a reentrant checkpoint silently gives that block no gradient.
    model = nn.Sequential(Checkpointed(mlp_blocks(), use_reentrant=True), nn.Linear(8, 2))
    return Case(model, torch.randn(4, 8), mean_square)


@case()
def checkpoint_reentrant_embedding() -> Case:
    model = Checkpointed(mlp_blocks(dropout=0.2), use_reentrant=True, entry=nn.Embedding(10, 8))
    return Case(model, torch.randint(0, 10, (2, 4)), mean_square)


class OneCheckpoint(nn.Module):
    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.before, self.head = nn.Linear(6, 8), nn.Linear(8, 2)
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)))
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.layers, self.before(x), use_reentrant=self.use_reentrant))


@case()
def checkpoint_around_layers() -> Case:
    return Case(OneCheckpoint(use_reentrant=False), torch.randn(4, 6), mean_square)


@case()
def checkpoint_reentrant_around_layers() -> Case:
    return Case(OneCheckpoint(use_reentrant=True), torch.randn(4, 6), mean_square)


class Nested(nn.Module):
    """A checkpoint inside a checkpoint, with dropout, keyword arguments and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.dropout = nn.Dropout(0.3)

    def inner(self, x: Tensor, *, scale: float) -> Tensor:
        return torch.tanh(self.c(self.dropout(x))) * scale

    def outer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.dropout(self.b(x)))
        return checkpoint(self.inner, x, use_reentrant=False, scale=0.5), x

    def forward(self, x: Tensor) -> Tensor:
        y, skip = checkpoint(self.outer, self.a(x), use_reentrant=False)
        return self.d(y + skip)


@case()
def checkpoint_nested_dropout() -> Case:
    return Case(Nested(), torch.randn(4, 6), mean_square)


class ConvCheckpoint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Conv2d(3, 6, 3, padding=1)
        self.body = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()) for _ in range(4))
        )
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint_sequential(self.body, 2, self.entry(x), use_reentrant=False)
        return self.head(x.mean((2, 3)))


@case()
def checkpoint_sequential_cnn() -> Case:
    labels = torch.tensor([0, 3])
    return Case(ConvCheckpoint(), torch.randn(2, 3, 8, 8), lambda out: functional.cross_entropy(out, labels))


run_checkpointed: Callable[..., Tensor] = checkpoint  # a reference taken at import, as user code takes it


class NoEarlyStop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        body = nn.Sequential(self.a, nn.Sigmoid(), self.b)
        return self.head(run_checkpointed(body, x, use_reentrant=False, early_stop=False))


@case()
def checkpoint_without_early_stop() -> Case:
    return Case(NoEarlyStop(), torch.randn(4, 6), mean_square)
