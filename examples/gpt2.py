"""A GPT-2 small written out, so that query, key and value are layers of their own; built without weights.

frostline cost examples/gpt2.py:gpt2_small --train @biases --train lm_head
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_BLOCKS, WIDTH, NUM_HEADS, VOCABULARY = 12, 768, 12, 50257
NUM_TOKENS = 512  # and as many positions: GPT-2 itself has 1024


class LoRALinear(nn.Linear):
    """``W x + B A x``: a linear layer with a low-rank update beside it."""

    def __init__(self, features: int, rank: int) -> None:
        super().__init__(features, features)
        self.lora_A = nn.Parameter(torch.randn(rank, features) / math.sqrt(features))
        self.lora_B = nn.Parameter(torch.zeros(features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.lora_A), self.lora_B)


class Attention(nn.Module):
    """Causal attention as two matrix products and a softmax (transformers' "eager", torch's "math")."""

    def __init__(self, lora_rank: int) -> None:
        super().__init__()

        def adapted() -> nn.Linear:
            return LoRALinear(WIDTH, lora_rank) if lora_rank else nn.Linear(WIDTH, WIDTH)

        self.q, self.k, self.v = adapted(), nn.Linear(WIDTH, WIDTH), adapted()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x_BTC: Tensor) -> Tensor:
        B, T, C = x_BTC.shape

        def heads(y_BTC: Tensor) -> Tensor:
            return y_BTC.view(B, T, NUM_HEADS, C // NUM_HEADS).transpose(1, 2)

        q_BHTD, k_BHTD, v_BHTD = heads(self.q(x_BTC)), heads(self.k(x_BTC)), heads(self.v(x_BTC))
        scores_BHTT = q_BHTD @ k_BHTD.transpose(-1, -2) / math.sqrt(C // NUM_HEADS)
        future_TT = torch.ones(T, T, dtype=torch.bool, device=x_BTC.device).triu(1)
        weights_BHTT = scores_BHTT.masked_fill(future_TT, float("-inf")).softmax(-1)
        return self.proj((weights_BHTT @ v_BHTD).transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    """Attention, then two linear layers around a GELU, each behind a layer norm and beside a residual path."""

    def __init__(self, lora_rank: int) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(WIDTH), Attention(lora_rank)
        self.ln_2, self.fc, self.proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attn(self.ln_1(x_BTC))
        return x_BTC + self.proj(F.gelu(self.fc(self.ln_2(x_BTC)), approximate="tanh"))


class GPT2(nn.Module):
    """GPT-2 small with a language-model head of its own: GPT-2 itself ties it to the token embedding."""

    def __init__(self, lora_rank: int = 0) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(NUM_TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Block(lora_rank) for _ in range(NUM_BLOCKS))
        self.ln_f = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x_BTC = self.wte(tokens_BT) + self.wpe(torch.arange(tokens_BT.shape[1], device=tokens_BT.device))
        for block in self.blocks:
            x_BTC = block(x_BTC)
        return self.lm_head(self.ln_f(x_BTC))


Target = tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]


def _target(lora_rank: int) -> Target:
    with torch.device("meta"):
        model = GPT2(lora_rank)
    tokens_BT = torch.zeros(1, NUM_TOKENS, dtype=torch.int64)
    return model, tokens_BT, lambda logits_BTV: F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT.flatten())


def gpt2_small() -> Target:
    """12 blocks of 768 features, vocabulary 50257, 1 x 512 tokens, head not tied."""
    return _target(lora_rank=0)


def gpt2_small_lora() -> Target:
    """The same with LoRA of rank 8 on the queries and values of all 12 blocks."""
    return _target(lora_rank=8)
