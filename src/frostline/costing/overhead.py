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

from frostline.kernels import lean_kernels
from frostline.kernels.bits import above, pack_bits
from frostline.probing.stopwatch import Stopwatch
from frostline.tracing.environment import undisturbed

_LAYERS = 32
_STEPS = 30
_OTHERS = 1 << 20  # numbers, more than a core has in a cache of its own


@dataclass(frozen=True)
class Overhead:
    """Seconds per op call, beyond what the same call takes alone; may be below 0, since C++ calls no Python.

    ``optimizer``: of a step, beside what it takes for each parameter. ``fresh``: per byte of memory that the system has
    to bring, beyond what it takes to write to memory that is there. ``packing``: per element that `frostline.kernels`
    packs to a bit. ``lean_...``: per op that these run in place of torch's own; ``lean_passing``: per op that comes by
    them, if only to be passed on.
    """

    forward: float
    backward: float
    optimizer: float = 0.0
    fresh: float = 0.0
    packing: float = 0.0
    lean_forward: float = 0.0
    lean_backward: float = 0.0
    lean_passing: float = 0.0


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
    with undisturbed(), device:
        return nn.Sequential(*(Layer() for _ in range(_LAYERS)))


def tiny_input(device: torch.device) -> torch.Tensor:
    """Its input."""
    return torch.ones(2, 4, device=device)


LARGEST_KEPT = 32 << 20
"""Bytes from which on a block always comes from the system and goes back to it: DEFAULT_MMAP_THRESHOLD_MAX of glibc."""


def settle_allocator(device: torch.device) -> None:
    """Let go of a block as large as the system's allocator keeps any, so that it keeps all that ops make from here on.

    Source: the dynamic thresholds in mallopt(3).
    """
    if device.type == "cpu":
        torch.empty(LARGEST_KEPT - (1 << 16), dtype=torch.uint8, device=device)


def measured_fresh(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds per byte of memory from the system; 0 where a device keeps what it has."""
    if device.type != "cpu":
        return 0.0
    nbytes = LARGEST_KEPT + LARGEST_KEPT // 2
    there = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    seen: list[float] = []
    for _ in range(5):
        times = [clock()]
        torch.empty(nbytes, dtype=torch.uint8, device=device).fill_(1)
        times.append(clock())
        there.fill_(1)
        times.append(clock())
        seen.append(times[1] - times[0] - (times[2] - times[1]))
    return max(0.0, statistics.median(seen)) / nbytes


def measured_packing(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds per element that is packed to a bit."""
    result = torch.zeros(1 << 22, device=device)
    if device.type != "cpu":  # which says by itself when it is done
        return Stopwatch(device, clock).time_call(lambda: _pack(result), 1).seconds / result.numel()
    seen: list[float] = []
    for _ in range(5):
        start = clock()
        _pack(result)
        seen.append(clock() - start)
    return statistics.median(seen) / result.numel()


def _pack(result: torch.Tensor) -> torch.Tensor:
    return pack_bits(result, above(0.0))


def measured_phases(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> tuple[float, float, float]:
    """The median seconds of forward and backward of the tiny network, and of an optimizer's step for one number."""
    model, x = tiny(device), tiny_input(device)
    number = nn.Parameter(torch.zeros(1, device=device))
    optimizer = torch.optim.AdamW([number])
    seen: list[tuple[float, float, float]] = []
    for _ in range(_STEPS):
        forward, backward = _step(model, x, clock)
        number.grad = torch.zeros_like(number.data)
        start = clock()
        optimizer.step()
        optimizer.zero_grad()
        seen.append((forward, backward, clock() - start))
    forward, backward, optimizing = (statistics.median(column) for column in zip(*seen, strict=True))
    return forward, backward, optimizing


class _AsInAStep(nn.Module):
    """A layer with what lies between two layers of a step: other data takes the place of the code in the caches."""

    def __init__(self, layer: nn.Module, others: torch.Tensor) -> None:
        super().__init__()
        self.layer, self.others = layer, others

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.others.sum()
        if x.requires_grad:
            x.register_hook(self._in_backward)
        out: torch.Tensor = self.layer(x)
        return out

    def _in_backward(self, _gradient: torch.Tensor) -> None:
        self.others.sum()


def measured_lean(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> tuple[float, float, float]:
    """Seconds per op under `frostline.kernels`: of forward and backward if they run it, and of passing it on."""
    with undisturbed(), device:
        others = torch.ones(_OTHERS if device.type == "cpu" else 0)  # (an accelerator's lies in no cache of the host's)
        layers = [layer for _ in range(_LAYERS // 2) for layer in (nn.Conv1d(2, 2, 1), nn.ReLU())]
        plain = [nn.Conv1d(2, 2, 1) for _ in range(_LAYERS)]  # all is read where all trains
        model, passing = (nn.Sequential(*(_AsInAStep(each, others) for each in row)) for row in (layers, plain))
        x = torch.ones(1, 2, 8)
    for layer in layers[2::2]:
        layer.requires_grad_(False)
    seen: list[tuple[float, float, float]] = []
    for _ in range(_STEPS):
        with lean_kernels():
            ours, passed = _step(model, x, clock), _step(passing, x, clock)
        own, alone = _step(model, x, clock), _step(passing, x, clock)
        seen.append((ours[0] - own[0], ours[1] - own[1], passed[0] - alone[0]))
    forward, backward, on = (max(0.0, statistics.median(column)) / _LAYERS for column in zip(*seen, strict=True))
    return max(0.0, forward - on), backward, on


def _step(model: nn.Module, x: torch.Tensor, clock: Callable[[], float]) -> tuple[float, float]:
    with torch.enable_grad():
        times = [clock()]
        loss = model(x).sum()
        times.append(clock())
        loss.backward()
        times.append(clock())
        model.zero_grad()
    return times[1] - times[0], times[2] - times[1]
