"""Batch norms whose input no gradient reads: in eval mode unless the scale trains, else if only the shift does.

In eval mode a batch norm is an affine map; in either, the gradient towards the shift is a sum of gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .function import Kernel, below_autograd, wanted
from .lean import replaces
from .unread import Looks, unread

_backward = torch.ops.aten.native_batch_norm_backward.default


class BatchNorm(Kernel):
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
        ctx.training, ctx.eps = how[0], how[-1]
        ctx.looks = Looks.of(input)
        with below_autograd():
            result, *others = op(input, weight, bias, mean, var, *how)
        ctx.mark_non_differentiable(*others)
        ctx.save_for_backward(weight, *((None, None) if how[0] else (mean, var)), *others[:2])
        return result, *others

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_of_statistics: None) -> Any:
        saved = ctx.saved_tensors
        if gradient is None:
            return (None,) * 9
        input = unread(ctx.looks, gradient)
        found = _backward(gradient, input, *saved, ctx.training, ctx.eps, wanted(ctx)[1:4])
        return (None, *found, *(None,) * 5)


@replaces("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")
def batch_norm(
    op: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Any, var: Any, training: bool, *how: Any
) -> Any:
    if (training and input.requires_grad) or (weight is not None and weight.requires_grad):
        return NotImplemented
    return BatchNorm.run(op, input, weight, bias, mean, var, training, *how)
