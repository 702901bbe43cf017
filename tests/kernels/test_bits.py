"""Bits without numpy, as accelerators make and use them, against those with it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from frostline.kernels import bits


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 1001])
def test_both_ways_are_one(count: int) -> None:
    answers = torch.rand(count) > 0.5
    packed = bits._packed(answers, answers)
    assert np.array_equal(packed.cpu().numpy(), np.packbits(answers.cpu().numpy(), bitorder="little"))
    assert torch.equal(bits._answers(packed).view(-1)[:count], answers)
    gradient = torch.randn(count)
    gradient[:2] = float("nan")
    through = bits._let_through_elsewhere(gradient, packed, None)
    assert torch.equal(through.view(torch.int32), torch.where(answers, gradient, 0.0).view(torch.int32))
