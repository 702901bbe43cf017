"""Convolutions, of any dimension, transposed or not: the input is read for grad_weight, the weight for grad_input.

Backward is eager's own ``convolution_backward``; in place of what was not kept it gets a tensor that looks the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .function import Kernel, below_autograd, wanted
from .lean import replaces
from .unread import Looks, unread

_backward = torch.ops.aten.convolution_backward.default


class Convolution(Kernel):
    @staticmethod
    def forward(ctx: Any, op: Any, input: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.how = how
        ctx.bias_shape = None if bias is None else list(bias.shape)
        kept = (input if weight.requires_grad else None, weight if input.requires_grad else None)
        ctx.looks = tuple(Looks.of(t) if k is None else None for t, k in zip((input, weight), kept, strict=True))
        ctx.save_for_backward(*kept)
        with below_autograd():
            return op(input, weight, bias, *how)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        kept = ctx.saved_tensors
        if gradient is None:
            return (None,) * (4 + len(ctx.how))
        given = (unread(looks, gradient) if k is None else k for k, looks in zip(kept, ctx.looks, strict=True))
        gradients = _backward(gradient, *given, ctx.bias_shape, *ctx.how, wanted(ctx)[1:4])
        return (None, *gradients, *(None for _ in ctx.how))


@replaces("convolution")
def convolution(op: Any, input: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Any:
    if input.requires_grad and weight.requires_grad:
        return NotImplemented
    return Convolution.run(op, input, weight, bias, *how)
