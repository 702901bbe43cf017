"""Tensors that stand for those of a trace, and smaller ones where the kernels themselves are to be asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from frostline.tracing.calls import Call, Slot, TensorMeta

_KEEP = 64


def stand_in(meta: TensorMeta, *, real: bool = False) -> Tensor:
    """A tensor with the metadata of one in the trace.

    Call it under the fake mode for a tensor without memory. Real ones hold zeros (integers) or ones (the rest).
    """
    if meta.layout is not torch.strided:
        return torch.empty(meta.shape, dtype=meta.dtype, layout=meta.layout, device=meta.device)
    tensor = torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device=meta.device)
    if real and tensor.numel():
        every = torch.empty(0, dtype=meta.dtype, device=meta.device).set_(tensor.untyped_storage())
        every.fill_(1 if meta.dtype.is_floating_point or meta.dtype.is_complex else 0)
    return tensor if not meta.lazy else tensor.conj() if meta.lazy == "conj" else torch._neg_view(tensor)


def shrunk_call(call: Call, keep: int = _KEEP) -> Call:
    """An op call with every size above ``keep``, wherever it occurs, replaced by a small one.

    Equal sizes stay equal and different ones different, so that shapes that belong together still fit.
    """
    large = sorted({size for slot in (*call.inputs, *call.outputs) for size in slot.meta.shape if size > keep})
    small = {size: keep + keep // 4 * (rank + 1) for rank, size in enumerate(large)}

    def shrink(slot: Slot) -> Slot:
        return replace(slot, meta=_smaller(slot.meta, small), known=None)

    return replace(
        call,
        args=_renamed(call.args, small),
        kwargs=_renamed(call.kwargs, small),
        inputs=[shrink(slot) for slot in call.inputs],
        outputs=[shrink(slot) for slot in call.outputs],
    )


def _smaller(meta: TensorMeta, small: dict[int, int]) -> TensorMeta:
    """Smaller sizes, laid out in memory in the same order of dimensions."""
    shape = tuple(small.get(size, size) for size in meta.shape)
    if not meta.stride:
        return replace(meta, shape=shape)
    stride = [0] * len(shape)
    step = 1
    for dim in sorted(range(len(shape)), key=lambda d: (meta.stride[d], -d)):
        if meta.stride[dim] == 0:
            continue
        stride[dim] = step
        step *= max(shape[dim], 1)
    return replace(meta, shape=shape, stride=tuple(stride))


def _renamed(value: Any, small: dict[int, int]) -> Any:
    """Sizes inside lists of integers (a normalised shape) follow; lone integers are dims, flags and the like."""
    if type(value) in (tuple, list):
        return type(value)(small.get(item, item) if type(item) is int else _renamed(item, small) for item in value)
    if type(value) is dict:
        return {key: _renamed(item, small) for key, item in value.items()}
    return value
