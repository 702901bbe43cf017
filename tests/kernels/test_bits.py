"""Bits made and used by three means, the loops in C, numpy, and torch as on accelerators: all say the same."""

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


SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 2.0, 6.0, float("inf"), float("-inf"), 6.0000005, 5.9999995]
CONDITIONS = [bits.above(0.0), bits.not_up_to(0.0), bits.not_up_to(2.0), bits.between(0.0, 6.0), bits.between(-1, 2)]


def values(count: int, dtype: torch.dtype, *more: float) -> torch.Tensor:
    """Numbers of all kinds, in any order."""
    found = torch.cat([torch.tensor([*SPECIAL, *more]), 4 * torch.randn(count)]).to(dtype)
    return found[torch.randperm(len(found))[:count]]


@pytest.mark.skipif(bits._loops is None, reason="no C compiler was there")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 1001, (1 << 17) + 3])
def test_with_and_without_a_compiler(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, count: int) -> None:
    for condition in CONDITIONS:
        unsaid = condition.kind == bits._BETWEEN
        given = values(count, dtype, *([] if unsaid else [float("nan")]))
        gradient = values(count, dtype, float("nan"))
        with monkeypatch.context() as patch:
            ours = bits.pack_bits(given, condition)
            through = [bits.let_through(gradient, ours, scale) for scale in (None, 1.25)]
            patch.setattr(bits, "_loops", None)
            assert torch.equal(bits.pack_bits(given, condition), ours)
            for found, scale in zip(through, (None, 1.25), strict=True):
                by_numpy = bits.let_through(gradient, ours, scale)
                assert torch.equal(found.view(torch.uint8), by_numpy.view(torch.uint8))
        answers = condition(given.float() if dtype.itemsize < 4 else given)
        assert np.array_equal(ours.numpy(), np.packbits(answers.numpy(), bitorder="little"))


@pytest.mark.parametrize("loops", [bits._loops, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_where_a_bit_cannot_say_it(monkeypatch: pytest.MonkeyPatch, loops: object, dtype: torch.dtype) -> None:
    monkeypatch.setattr(bits, "_loops", loops)
    for place in (0, 5, 8, 20):
        given = values(21, dtype)
        given[place] = float("nan")
        with pytest.raises(bits.NoBitsError):
            bits.pack_bits(given, bits.between(0.0, 6.0))
