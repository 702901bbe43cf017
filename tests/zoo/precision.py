"""Other dtypes, autocast, complex numbers."""

from __future__ import annotations

import torch
from tests.cases import Case, case
from tests.zoo.dense import mean_square
from torch import Tensor, nn


@case()
def float64_mlp() -> Case:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    return Case(model, torch.randn(4, 6, dtype=torch.float64), mean_square)


@case()
def bfloat16_mlp() -> Case:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2)).bfloat16()
    return Case(model, torch.randn(4, 6).bfloat16(), lambda out: out.float().square().mean())


class SharedUnderAutocast(nn.Module):
    """One weight used twice: autocast caches its cast only if the weight trains."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.shared, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.shared(torch.relu(self.a(x)))
            x = self.norm(self.shared(x))
            return self.head(x)


@case()
def autocast_shared_weight() -> Case:
    return Case(SharedUnderAutocast(), torch.randn(4, 6), lambda out: out.float().square().mean())


@case()
def autocast_cnn() -> Case:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(216, 3))
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 2])

    def step(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(x)
        return nn.functional.cross_entropy(logits.float(), labels)

    return Case(model, step=step)


class FourierLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(8, 8), nn.Linear(8, 2)
        self.spectrum = nn.Parameter(torch.randn(5, 5, dtype=torch.cfloat) / 4)

    def forward(self, x: Tensor) -> Tensor:
        modes = torch.fft.rfft(self.before(x))
        return self.after(torch.fft.irfft(modes @ self.spectrum, n=8))


@case()
def complex_fourier() -> Case:
    return Case(FourierLayer(), torch.randn(3, 8), mean_square)


class Spectrum(nn.Module):
    """Complex weights, and views that torch conjugates or negates only where a kernel needs it."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(5, 5, dtype=torch.complex64))
        self.filters = nn.Parameter(torch.randn(5, 3, dtype=torch.complex64))
        self.scale, self.head = nn.Parameter(torch.randn(3)), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x) @ self.mix
        power = (spectrum * spectrum.conj()).real @ self.filters.abs()
        phase = (spectrum @ self.filters).conj().imag
        return self.head(power + phase * self.scale)


@case()
def complex_spectrum() -> Case:
    return Case(Spectrum(), torch.randn(4, 8), mean_square)


class CastInsideACall(nn.Module):
    """One weight twice, on activations that are not contiguous: what `F.linear` runs, casts too, depends on flags."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.query(x).transpose(1, 2)
            return self.out(y) + self.out(y * 1.5)


@case()
def autocast_cast_inside_a_call() -> Case:
    return Case(CastInsideACall(), torch.randn(2, 4, 4), lambda out: out.float().square().mean())
