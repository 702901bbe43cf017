"""A small network to train a part of, and everything that a run could leave behind in it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.Dropout(0.2),
        nn.Flatten(), nn.Linear(128, 2),
    )  # fmt: skip


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 8, 8, generator=generator), torch.tensor([0, 1, 1, 0])


def loss_of(model: nn.Module) -> Tensor:
    inputs, labels = batch()
    return F.cross_entropy(model(inputs), labels)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def wiring(model: nn.Module) -> dict[str, object]:
    """Everything that a run could leave behind: flags, gradients, modes, hooks, and which tensor is where."""
    return {
        "flags": [p.requires_grad for p in model.parameters()],
        "gradients": [id(p.grad) for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "buffers": [[(name, id(b)) for name, b in m._buffers.items()] for m in model.modules()],
        "parameters": [[(name, id(p)) for name, p in m._parameters.items()] for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "hooks": [
            [
                (name, list(getattr(m, name)))
                for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called")
            ]
            for m in model.modules()
        ],
        "tensor hooks": [p._backward_hooks for p in model.parameters()],
    }
