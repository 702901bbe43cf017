"""Attention written with torch alone."""

from __future__ import annotations

import torch
from tests.cases import Case, case
from tests.zoo.dense import mean_square
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    """Self-attention; ``bias`` is a learned additive one, which makes torch choose another kernel when it trains."""

    def __init__(self, width: int = 8, heads: int = 2, length: int = 5, *, bias: bool = False, causal: bool = False):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.randn(heads, length, length) / 4) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=self.bias, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int = 8, **attention: object) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, **attention)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


@case()
def attention_causal() -> Case:
    return Case(nn.Sequential(Block(causal=True), Block(causal=True)), torch.randn(2, 5, 8), mean_square)


@case()
def attention_learned_bias() -> Case:
    return Case(nn.Sequential(nn.Linear(8, 8), Block(bias=True), Block(bias=True)), torch.randn(2, 5, 8), mean_square)


class Perceiver(nn.Module):
    """Learned queries: the gradient towards them is a gradient towards something made from parameters alone."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(3, 8))
        self.q, self.kv, self.head = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).chunk(2, dim=-1)
        q = self.q(self.queries).expand(x.shape[0], -1, -1)
        q, k, v = (t.unsqueeze(1) for t in (q, k, v))
        return self.head(functional.scaled_dot_product_attention(q, k, v).squeeze(1))


@case()
def learned_queries() -> Case:
    return Case(Perceiver(), torch.randn(2, 5, 8), mean_square)


class DenseMixture(nn.Module):
    """Every token visits every expert; the gate only weighs them."""

    def __init__(self, experts: int = 3, width: int = 6) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, width, 2 * width) / 3)
        self.down = nn.Parameter(torch.randn(experts, 2 * width, width) / 3)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        y = torch.relu(torch.einsum("nd,edh->enh", x, self.up))
        return self.head(torch.einsum("enh,ehd,ne->nd", y, self.down, weights))


@case()
def mixture_dense() -> Case:
    return Case(DenseMixture(), torch.randn(7, 6), mean_square)


class RoutedMixture(nn.Module):
    """Each token visits its best expert; how many rows each gets is known only from the data."""

    def __init__(self, experts: int = 3, width: int = 6) -> None:
        super().__init__()
        self.before, self.gate = nn.Linear(width, width), nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, width)) for _ in range(experts)
        )
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows = (chosen == i).nonzero().squeeze(1)
            y = y.index_add(0, rows, expert(x[rows]) * weight[rows, None])
        return self.head(y)


@case(data_decides=True)
def mixture_routed() -> Case:
    return Case(RoutedMixture(), torch.randn(9, 6), mean_square)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.1, batch_first=True)
    return nn.Sequential(nn.Linear(6, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 2))


@case()
def transformer_encoder_train() -> Case:
    return Case(encoder(), torch.randn(2, 5, 6), mean_square)


@case()
def transformer_encoder_eval() -> Case:
    # The fused fast path runs only while nothing inside requires grad.
    return Case(encoder().eval(), torch.randn(2, 5, 6), mean_square)


class CrossAttention(nn.Module):
    def __init__(self, *, weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, kdim=6, vdim=5, batch_first=True)
        self.head, self.weights = nn.Linear(8, 2), weights

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        y, weights = self.attention(query, key, value, need_weights=self.weights)
        return self.head(y) if weights is None else self.head(y) + weights.sum(-1, keepdim=True)


@case()
def multihead_attention() -> Case:
    inputs = torch.randn(2, 3, 8), torch.randn(2, 4, 6), torch.randn(2, 4, 5)
    return Case(CrossAttention(weights=False), inputs, mean_square)


@case()
def multihead_attention_weights() -> Case:
    inputs = torch.randn(2, 3, 8), torch.randn(2, 4, 6), torch.randn(2, 4, 5)
    return Case(CrossAttention(weights=True), inputs, mean_square)
