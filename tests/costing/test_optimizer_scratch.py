"""What an optimizer's step takes for itself: asked of torch's own class, held to the allocator."""

from __future__ import annotations

import pytest
import torch
from tests.truth.allocator import allocated_peak
from torch import nn

from frostline.costing.optimizers import optimizer_model

ALIKE = [[1000], [1000, 1000]]
MIXED = [[3000, 1000], [1000, 3000], [500, 2000, 1000, 4000]]
EXACT = [(name, sizes) for name in ("AdamW", "Adam", "NAdam", "SGD") for sizes in ALIKE + MIXED]


@pytest.mark.parametrize(
    ("name", "sizes"), [*EXACT, *((name, sizes) for name in ("RMSprop", "Adagrad", "Adadelta") for sizes in ALIKE)]
)
def test_scratch_is_the_allocators(name: str, sizes: list[int]) -> None:
    parameters = [nn.Parameter(torch.ones(size)) for size in sizes]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter.data)
    optimizer = getattr(torch.optim, name)(parameters)
    optimizer.step()
    real = allocated_peak(optimizer.step)
    # (Beside its tensors: some numbers of a few bytes, such as a bias correction.)
    assert optimizer_model(name).scratch_bytes(parameters) == pytest.approx(real, abs=64)


@pytest.mark.parametrize("sizes", ALIKE + MIXED)
def test_on_accelerators_parameters_are_stepped_together(sizes: list[int]) -> None:
    parameters = [nn.Parameter(torch.ones(size)) for size in sizes]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter.data)
    optimizer = torch.optim.AdamW(parameters, foreach=True)
    optimizer.step()
    real = allocated_peak(optimizer.step)
    there = optimizer_model("adamw").scratch_bytes(parameters, torch.device("cuda"))
    assert there == pytest.approx(real, abs=64)
