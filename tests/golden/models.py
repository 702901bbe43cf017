"""Small models whose reports are kept in this folder. Plain torch, so that only torch can change a figure."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Target = tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]


def mean_square(outputs: Tensor) -> Tensor:
    return outputs.square().mean()


def mlp() -> Target:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(8, 16), mean_square


class Block(nn.Module):
    """Attention written out, then two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out((q @ k.transpose(-1, -2) / 8).softmax(-1) @ v)
        return x + self.down(torch.relu(self.up(self.norm2(x))))


class Encoder(nn.Module):
    """An embedding, blocks, a head."""

    def __init__(self, num_blocks: int = 6, width: int = 64, rank: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, width)
        self.embed_norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(num_blocks))
        self.head = nn.Linear(width, 2)
        self.adapter = nn.Sequential(nn.Linear(width, rank), nn.Linear(rank, width)) if rank else None

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_norm(self.embed(tokens))
        for block in self.blocks:
            x = block(x)
        if self.adapter is not None:
            x = x + self.adapter(x)
        return self.head(x.mean(1))


def encoder() -> Target:
    return Encoder(), torch.randint(0, 1000, (4, 32)), mean_square


def encoder_with_adapter() -> Target:
    return Encoder(rank=4), torch.randint(0, 1000, (4, 32)), mean_square
