"""Dropout: of the noise, one bit an element is read, whether it was dropped.

The noise is drawn as torch draws it, from the same random numbers, and made again from its bits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .bits import above, let_through, pack_bits, unpack_bits
from .function import Kernel, below_autograd
from .lean import LeanKernels, NotCoveredError, Op, check_no_hooks, replaces
from .unread import Looks, lies_alike
from .unseen import aside, unseen


@lru_cache(maxsize=64)
def _scale(dtype: torch.dtype, p: float) -> float:
    """What torch multiplies by what is not dropped."""
    with unseen(), torch._C._AutoDispatchBelowAutograd():
        return float(torch.ops.aten.div_.Scalar(torch.ones(1, dtype=dtype, device="cpu"), 1 - p))


class Dropout(Kernel):
    @staticmethod
    def forward(ctx: Any, run: LeanKernels, op: Op, input: Tensor, p: float) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.p = p
        with below_autograd():
            noise = torch.empty_like(input).bernoulli_(1 - p)
            ctx.looks = Looks.of(noise)
            with aside(noise):
                run.save(ctx, pack_bits(noise, above(0.0)))
            torch.ops.aten.div_.Scalar(noise, 1 - p)
            if not op.is_in_place:
                return input * noise
            ctx.mark_dirty(input)
            return input.mul_(noise)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        (bits,) = ctx.saved_tensors
        if gradient is None:
            return None, None, None, None
        looks = ctx.looks
        if lies_alike(gradient, looks):
            return None, None, let_through(gradient, bits, _scale(looks.dtype, ctx.p)), None
        noise = unpack_bits(bits, looks.shape, looks.stride, looks.dtype).div_(1 - ctx.p)
        return None, None, gradient * noise, None


@replaces("dropout", "dropout_")
def dropout(run: LeanKernels, op: Op, input: Tensor, p: float, train: bool) -> Any:
    if not train or not 0 < p < 1 or input.numel() == 0:
        return NotImplemented
    check_no_hooks()
    if input.device.type != "cpu" and not op.is_in_place:  # there it ends in native_dropout
        return NotImplemented
    if op.is_in_place and (input._is_view() or input.is_leaf):
        raise NotCoveredError("written in place to a view or a leaf")
    return Dropout.run(run, op, input, p)


class NativeDropout(Kernel):
    @staticmethod
    def forward(ctx: Any, run: LeanKernels, op: Op, input: Tensor, p: float, train: bool) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.scale = 1 / (1 - p)
        with below_autograd():
            result, mask = op.call(input, p, train)
            with aside(mask):
                run.save(ctx, pack_bits(mask))
        ctx.looks = Looks.of(mask)
        ctx.mark_non_differentiable(mask)
        return result, mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, _of_mask: None) -> Any:
        (bits,) = ctx.saved_tensors
        if gradient is None:
            return None, None, None, None, None
        mask = unpack_bits(bits, ctx.looks.shape, ctx.looks.stride, torch.bool)
        if torch.is_grad_enabled():  # as torch does
            return None, None, gradient * (mask * ctx.scale), None, None
        return None, None, torch.ops.aten.native_dropout_backward(gradient, mask, ctx.scale), None, None


@replaces("native_dropout")
def native_dropout(run: LeanKernels, op: Op, input: Tensor, p: float, train: bool | None) -> Any:
    if train is False or not 0 < p < 1 or input.numel() == 0:
        return NotImplemented
    check_no_hooks()
    return NativeDropout.run(run, op, input, p, train)
