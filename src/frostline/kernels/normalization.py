"""Batch norms in eval mode: an affine map, whose input is read for the gradient of its scale alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .function import Kernel, anchor, below_autograd, tied, wanted
from .lean import replaces
from .unread import Looks, unread

_backward = torch.ops.aten.native_batch_norm_backward.default


class EvalBatchNorm(Kernel):
    @staticmethod
    def forward(
        ctx: Any,
        op: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        *how: Any,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.eps = how[-1]
        ctx.looks = Looks.of(input)
        with below_autograd():
            result, *others = op(input, weight, bias, mean, var, *how)
        ctx.mark_non_differentiable(*others)
        tie = anchor(input)
        ctx.save_for_backward(weight, mean, var, *others[:2], tie)
        return result, *others, tie

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *rest: Tensor | None) -> Any:
        weight, mean, var, save_mean, save_invstd, tie = ctx.saved_tensors
        if gradient is None and rest[-1] is not None:
            gradient = torch.zeros(ctx.looks.shape, dtype=ctx.looks.dtype, device=mean.device)
        if gradient is None:
            return (None,) * 9
        input = tied(unread(ctx.looks, gradient), tie)
        found = _backward(gradient, input, weight, mean, var, save_mean, save_invstd, False, ctx.eps, wanted(ctx)[1:4])
        return (None, *found, *(None,) * 5)


@replaces("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")
def batch_norm(
    op: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Any, var: Any, training: bool, *how: Any
) -> Any:
    if training or (weight is not None and weight.requires_grad):
        return NotImplemented
    *results, _anchor = EvalBatchNorm.run(op, input, weight, bias, mean, var, training, *how)
    return tuple(results)
