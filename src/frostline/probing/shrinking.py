"""The same call on smaller tensors: to check a fake kernel where the real one would take too much memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from frostline.tracing.calls import Call, Slot, TensorMeta
from frostline.tracing.graph import Unit

_KEEP = 64  # sizes up to this stay as they are


def shrunk(unit: Unit) -> Unit | None:
    """``unit`` on smaller tensors (see `shrunk_call`); None if it is not a plain op."""
    if unit.call.kind != "op":
        return None
    call = shrunk_call(unit.call)
    return replace(unit, call=call, inputs=call.inputs, outputs=call.outputs)


def shrunk_call(call: Call) -> Call:
    """An op call with every large size, wherever it occurs, replaced by a small one.

    Equal sizes stay equal and different ones different, so that shapes that belong together still fit.
    """
    large = sorted({size for slot in (*call.inputs, *call.outputs) for size in slot.meta.shape if size > _KEEP})
    small = {size: _KEEP + 16 * (rank + 1) for rank, size in enumerate(large)}

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
