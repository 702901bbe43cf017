"""How large the storages really are that ops return: a fake kernel gives what the shape needs, a real one maybe more.

(``F.fold`` allocates like its input and shrinks the tensor, not the storage; the fused LSTM's workspace has no shape.)
An op is checked once on small tensors; only one that was caught is run for real wherever it occurs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from frostline.tracing.calls import Call, fill, is_view, tensors_in
from frostline.tracing.environment import is_here, undisturbed
from frostline.tracing.stand_ins import shrunk_call, stand_in

_REAL_LIMIT = 1 << 30  # bytes of tensors that one op may be given to be run for real
_trusted: dict[Any, bool] = {}


def true_sizes(calls: Iterable[Call], fake_mode: FakeTensorMode) -> dict[int, int]:
    """Storage -> bytes, where fake kernels were wrong. Ops that refuse made-up values are taken at their word."""
    found: dict[int, int] = {}
    known: dict[Any, list[int] | None] = {}
    for call in calls:
        if is_view(call.target) or not call.outputs or call.target._schema.is_mutable or not _can_run(call):
            continue
        key = (call.target, tuple(slot.meta.dtype for slot in call.inputs))
        if key not in _trusted:
            small = shrunk_call(call)
            _trusted[key] = _returned(small, None) in (None, _returned(small, fake_mode))
        if _trusted[key] or sum(slot.meta.nbytes for slot in (*call.inputs, *call.outputs)) > _REAL_LIMIT:
            continue
        like = (call.target, repr(call.args), repr(call.kwargs), tuple(slot.meta for slot in call.inputs))
        if like not in known:
            known[like] = _returned(call, None)
        for slot, nbytes in zip(call.outputs, known[like] or (), strict=False):
            found[slot.storage] = nbytes
    return found


def _can_run(call: Call) -> bool:
    return all(
        is_here(slot.meta.device) and slot.meta.layout is torch.strided for slot in (*call.inputs, *call.outputs)
    )


def _returned(call: Call, fake_mode: FakeTensorMode | None) -> list[int] | None:
    """Bytes of the storage behind each tensor that the op returns; None if it does not run on such tensors."""
    try:
        # (No tensor here needs a gradient, but a kernel may ask whether any could: the fused LSTM's workspace.)
        with torch.set_grad_enabled(call.grad_enabled), undisturbed():
            if fake_mode is None:
                return _run(call, real=True)
            with fake_mode:
                return _run(call, real=False)
    except Exception:  # made-up values, or sizes, that the op refuses
        return None


def _run(call: Call, *, real: bool) -> list[int] | None:
    tensors = [stand_in(slot.meta, real=real) for slot in call.inputs]
    result = call.target(*fill(call.args, tensors), **fill(call.kwargs, tensors))
    made = list(tensors_in(result))
    if tuple(made[0].shape) != call.outputs[0].meta.shape:
        return None  # the values, made up here, decide how much comes out
    return [tensor.untyped_storage().nbytes() for tensor in made]
