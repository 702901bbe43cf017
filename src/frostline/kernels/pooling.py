"""Pools: an average's backward reads the input's shape; a maximum's, where in its window it was, one byte.

Backward is eager's own, on a tensor that looks like the input, and for a maximum on its indices made again.
"""

from __future__ import annotations

from functools import lru_cache, reduce
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .function import Kernel, anchor, below_autograd, tied
from .holding import Holder
from .lean import NotCoveredError, current_run, replaces
from .leaving_out import LeaveOut, users_hooks
from .unread import Looks, unread
from .unseen import aside, unseen

_aten = torch.ops.aten


@replaces("avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d")
def average_pool(_op: Any, input: Tensor, *_how: Any) -> Any:
    return LeaveOut(input)


class Windows:
    """The windows of a pool: where an index into the input lies in the window of its place in the output."""

    def __init__(self, input: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, num_dims: int) -> None:
        def each(given: Any) -> list[int]:
            return list(given) * num_dims if len(given) == 1 else list(given)

        self.kernel = each(kernel)
        self.stride = each(stride) or self.kernel
        self.padding, self.dilation = each(padding), each(dilation)
        self.steps = [prod(input.shape[d + 1 :]) for d in range(-num_dims, -1)] + [1]
        self.shape = tuple(input.shape[-num_dims:])

    @property
    def never_empty(self) -> bool:
        """Whether each window has an element of the input: where it has none, an index means nothing."""
        return all(d == 1 or p == 0 for d, p in zip(self.dilation, self.padding, strict=True))

    def starts(self, like: Tensor) -> Tensor:
        """The index, if it were in the input, of the first element of each place's window."""
        along = []
        for dim, (stride, padding, step) in enumerate(zip(self.stride, self.padding, self.steps, strict=True)):
            size, first, apart = like.shape[dim - len(self.kernel)], -padding * step, stride * step
            places = torch.arange(first, first + size * apart, apart, device=like.device)
            along.append(places.view(-1, *(1,) * (len(self.kernel) - 1 - dim)))
        return reduce(torch.add, along)

    def offsets(self) -> list[int]:
        """How far each element of a window is from the first."""
        along = [[i * d * s for i in range(k)] for k, d, s in zip(self.kernel, self.dilation, self.steps, strict=True)]
        return [sum(place) for place in product(*along)]

    def pack(self, indices: Tensor) -> Tensor:
        offset = indices - self.starts(indices)
        offsets = self.offsets()
        if offsets[-1] < 256:
            return offset.to(torch.uint8)
        number = _numbers(offsets, indices)[1]
        return torch.empty_like(indices, dtype=torch.uint8).copy_(number[offset])

    def unpack(self, packed: Tensor) -> Tensor:
        offsets = self.offsets()
        wide = packed.to(torch.int64)
        if offsets[-1] >= 256:
            wide = wide.copy_(_numbers(offsets, packed)[0][wide])
        return wide.add_(self.starts(wide))


def _numbers(offsets: list[int], like: Tensor) -> tuple[Tensor, Tensor]:
    """The offset of each element of a window by its number, and the number by its offset."""
    if isinstance(like, FakeTensor):
        return _made_numbers(tuple(offsets), like.device)
    with unseen():
        return _kept_numbers(tuple(offsets), like.device)


def _made_numbers(offsets: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    table = torch.tensor(offsets, device=device)
    number = torch.zeros(offsets[-1] + 1, dtype=torch.uint8, device=device)
    number[table] = torch.arange(len(offsets), dtype=torch.uint8, device=device)
    return table, number


_kept_numbers = lru_cache(maxsize=64)(_made_numbers)  # (making them, an accelerator would be waited for)


class MaxPool(Kernel):
    @staticmethod
    def forward(ctx: Any, op: Any, windows: Windows, holder: Holder | None, input: Tensor, *how: Any) -> Any:
        ctx.set_materialize_grads(False)
        ctx.op = (
            _aten.max_pool2d_with_indices_backward
            if len(windows.kernel) == 2
            else _aten.max_pool3d_with_indices_backward
        )
        ctx.windows, ctx.holder, ctx.looks, ctx.how = windows, holder, Looks.of(input), how
        with below_autograd():
            result, indices = op(input, *how)
            packed = [windows.pack(indices)] if holder is None else []
        with aside(input):
            if holder is not None:
                holder.hold(indices)
            tie = anchor(input.dtype)
        ctx.save_for_backward(tie, *packed)
        ctx.mark_non_differentiable(indices)
        return result, indices, tie

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, _of_indices: None, of_anchor: Tensor | None) -> Any:
        tie, *packed = ctx.saved_tensors
        nothing = (None,) * len(ctx.how)
        if gradient is None and of_anchor is None:
            return (None,) * 4 + nothing
        indices = ctx.windows.unpack(packed[0]) if ctx.holder is None else ctx.holder.take()
        if gradient is None:
            gradient = torch.zeros_like(indices, dtype=ctx.looks.dtype)
        input = tied(unread(ctx.looks, gradient), tie)
        return None, None, None, ctx.op(gradient, input, *ctx.how, indices), *nothing


@replaces("max_pool2d_with_indices", "max_pool3d_with_indices")
def max_pool(op: Any, input: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> Any:
    windows = Windows(input, kernel, stride, padding, dilation, 2 if "2d" in op._schema.name else 3)
    if prod(windows.kernel) > 256:
        raise NotCoveredError("a place in its window takes more than a byte")
    if not windows.never_empty:
        raise NotCoveredError("a window may have no element of the input")
    hooks = users_hooks()
    name = "is output 1 of MaxPool2DWithIndicesBackward0"
    holder = None if hooks is not None else current_run().holder(windows.pack, windows.unpack, name)
    result, indices, _anchor = MaxPool.run(op, windows, holder, input, kernel, stride, padding, dilation, ceil_mode)
    if holder is not None:
        holder.watch(indices)
    return result, indices
