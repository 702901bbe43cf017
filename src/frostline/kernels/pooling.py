"""Pools: an average's backward reads the input's shape; a maximum's, where in its window it was, one byte.

Backward is eager's own, on a tensor that looks like the input, and for a maximum on its indices made again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .function import Kernel, anchor, below_autograd, tied
from .holding import Holder
from .lean import LeanKernels, Op, check_no_hooks, leaves_out, replaces
from .unread import Looks, unread
from .unseen import aside
from .windows import Windows, windows_of

_aten = torch.ops.aten


@leaves_out("avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d")
def average_pool() -> tuple[str]:
    return ("self",)


class MaxPool(Kernel):
    @staticmethod
    def forward(ctx: Any, op: Op, windows: Windows, holder: Holder, input: Tensor, *how: Any) -> Any:
        ctx.set_materialize_grads(False)
        ctx.op = (
            _aten.max_pool2d_with_indices_backward
            if len(windows.apart) == 2
            else _aten.max_pool3d_with_indices_backward
        )
        ctx.windows, ctx.holder, ctx.looks, ctx.how = windows, holder, Looks.of(input), how
        with below_autograd():
            result, indices = op.call(input, *how)
        with aside(input):
            holder.hold(indices)
            tie = anchor(input.dtype)
        ctx.save_for_backward(tie)
        ctx.mark_non_differentiable(indices)
        return result, indices, tie

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, _of_indices: None, of_anchor: Tensor | None) -> Any:
        (tie,) = ctx.saved_tensors
        nothing = (None,) * len(ctx.how)
        if gradient is None and of_anchor is None:
            return (None,) * 4 + nothing
        indices, was_packed = ctx.holder.take()
        if was_packed:
            indices = ctx.holder.unpacked(indices)
        if gradient is None:
            gradient = torch.zeros_like(indices, dtype=ctx.looks.dtype)
        input = tied(unread(ctx.looks, gradient), tie)
        return None, None, None, ctx.op(gradient, input, *ctx.how, indices), *nothing


@replaces("max_pool2d_with_indices", "max_pool3d_with_indices")
def max_pool(
    run: LeanKernels, op: Op, input: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool
) -> Any:
    check_no_hooks()
    shape = tuple(input.shape[-2 if "2d" in op.name else -3 :])
    windows = windows_of(shape, tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))
    holder = Holder(windows.pack, windows.unpack, "is output 1 of MaxPool2DWithIndicesBackward0", run)
    result, indices, _anchor = MaxPool.run(op, windows, holder, input, kernel, stride, padding, dilation, ceil_mode)
    holder.watch(indices)
    return result, indices
