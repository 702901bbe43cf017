"""What a step takes beside its kernels, per op call: Python and dispatch forward, autograd's engine backward.

Measured on a network whose kernels take next to nothing: the seconds of its step, less those of its ops alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

_LAYERS = 32
_STEPS = 30


@dataclass(frozen=True)
class Overhead:
    """Seconds per op call, beyond what the same call takes alone; may be below 0, since C++ calls no Python."""

    forward: float
    backward: float
    optimizer: float = 0.0  # of a step, beside what it takes for each parameter

    def of_step(self, forward_ops: int, backward_ops: int) -> float:
        """Seconds of a step that runs so many."""
        return self.optimizer + self.forward * forward_ops + self.backward * backward_ops


NONE = Overhead(0.0, 0.0)


class Layer(nn.Module):
    """A linear map and an activation: two modules, as many Python calls as most models make for their ops."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.activation = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.activation(self.linear(x))
        return out


def tiny(device: torch.device) -> nn.Module:
    """The network."""
    with torch.random.fork_rng(devices=[]):
        return nn.Sequential(*(Layer() for _ in range(_LAYERS))).to(device)


def tiny_input(device: torch.device) -> torch.Tensor:
    """Its input."""
    return torch.ones(2, 4, device=device)


def measured_phases(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> tuple[float, float, float]:
    """The median seconds of forward and backward of the tiny network, and of an optimizer's step for one number."""
    model, x = tiny(device), tiny_input(device)
    number = nn.Parameter(torch.zeros(1, device=device))
    optimizer = torch.optim.AdamW([number])
    seen: list[tuple[float, float, float]] = []
    with torch.enable_grad():
        for _ in range(_STEPS):
            number.grad = torch.zeros_like(number.data)
            times = [clock()]
            loss = model(x).sum()
            times.append(clock())
            loss.backward()
            times.append(clock())
            optimizer.step()
            optimizer.zero_grad()
            times.append(clock())
            model.zero_grad()
            seen.append((times[1] - times[0], times[2] - times[1], times[3] - times[2]))
    forward, backward, optimizing = (statistics.median(column) for column in zip(*seen, strict=True))
    return forward, backward, optimizing
