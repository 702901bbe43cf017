"""Random small networks to plan for: at most ten tensors, with branches, ties, and parts no gradient comes to."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 4


class Small(nn.Module):
    """A random program over one stream and a kept branch; every run of it is the same."""

    def __init__(self, choose: random.Random, most: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.weights = nn.ParameterList()
        self.program: list[tuple[str, int]] = []
        self.tokens = choose.random() < 0.3
        if self.tokens:
            self._add("embed", nn.Embedding(11, WIDTH))
        while True:
            step = choose.choice(
                ["linear", "linear", "bare", "norm", "scale", "again", "relu", "gelu", "dropout", "keep", "add", "mul",
                 "cut", "matmul", "frozen", "conv"]
            )  # fmt: skip
            room = most - self.num_tensors
            if room < 2:
                break
            if step in ("linear", "norm", "conv"):
                made: dict[str, Any] = {"linear": nn.Linear(WIDTH, WIDTH), "norm": nn.LayerNorm(WIDTH)}
                self._add(step, made.get(step) or nn.Conv1d(6, 6, 1))
            elif step == "bare":
                self._add("linear", nn.Linear(WIDTH, WIDTH, bias=False))
            elif step == "again" and self.layers:
                at = choose.randrange(len(self.layers))
                if not isinstance(self.layers[at], nn.Embedding):
                    self.program.append(("conv" if isinstance(self.layers[at], nn.Conv1d) else "linear", at))
            elif step in ("scale", "matmul", "frozen"):
                shape = {"scale": (WIDTH,), "matmul": (WIDTH, WIDTH), "frozen": (WIDTH,)}[step]
                self.weights.append(nn.Parameter(torch.rand(shape) + 0.5))
                self.program.append((step, len(self.weights) - 1))
            elif step == "cut" and choose.random() < 0.7:
                continue
            else:
                self.program.append((step, 0))
            if len(self.program) > 18:
                break
        if not self.num_tensors:
            self._add("linear", nn.Linear(WIDTH, WIDTH))

    @property
    def num_tensors(self) -> int:
        return len(list(self.parameters()))

    def _add(self, kind: str, layer: nn.Module) -> None:
        self.layers.append(layer)
        self.program.append((kind, len(self.layers) - 1))

    def forward(self, x: Tensor) -> Tensor:
        start = True
        kept: Tensor | None = None
        for kind, at in self.program:
            if kind == "embed":
                x, start = self.layers[at](x), False
                continue
            if start and self.tokens:
                x, start = F.one_hot(x, WIDTH + 7)[..., :WIDTH].float(), False
            kept = x if kept is None else kept
            if kind in ("linear", "norm", "conv"):
                x = self.layers[at](x)
            elif kind == "scale":
                x = x * self.weights[at]
            elif kind == "matmul":
                x = x @ self.weights[at]
            elif kind == "frozen":  # used, and cut off from the loss
                x = x + (x.mean() * self.weights[at]).detach()
            elif kind == "relu":
                x = x.relu()
            elif kind == "gelu":
                x = F.gelu(x)
            elif kind == "dropout":
                x = F.dropout(x, 0.2, self.training)
            elif kind == "keep":
                kept = x
            elif kind == "add":
                x = x + kept
            elif kind == "mul":
                x = x * kept.sigmoid()
            elif kind == "cut":
                x = x + x.detach()
        return x.square().mean()


def small_network(seed: int, most: int = 10) -> tuple[nn.Module, Tensor]:
    """A network whose loss reaches some parameter, and its input."""
    choose = random.Random(seed)
    torch.manual_seed(seed)
    model = Small(choose, choose.randint(5, most))
    given = torch.randint(0, 11, (3, 6)) if model.tokens else torch.randn(3, 6, WIDTH)
    return model.train(choose.random() < 0.7), given
