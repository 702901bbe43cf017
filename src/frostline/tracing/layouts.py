"""How the real kernels lay their results out, where fake ones may be wrong about it.

A fake batch norm of a transposed activation, say, is not laid out as the real one, and whether the ``reshape`` behind
it copies follows from that. Only ops given other than contiguous tensors are asked, each once, on small tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from frostline.tracing.calls import Call, TensorMeta, fill, freeze, is_view, tensors_in
from frostline.tracing.environment import is_here, undisturbed
from frostline.tracing.stand_ins import shrunk_call, stand_in

Order = tuple[int, ...]  # dimensions from the one that varies slowest in memory to the fastest
_known: dict[Any, tuple[Order | None, ...]] = {}


def with_true_layout(call: Call, result: Any) -> Any:
    """What an op returned on fake tensors, laid out as its kernel does. ``call.outputs`` describe ``result``."""
    if is_view(call.target) or call.target._schema.is_mutable or all(map(_contiguous, call.inputs)):
        return result
    if not any(len(slot.meta.shape) > 1 for slot in call.outputs):
        return result
    if not all(is_here(slot.meta.device) for slot in call.inputs):
        return result
    try:
        key = (call.target, freeze(call.args), freeze(call.kwargs), tuple(slot.meta for slot in call.inputs))
    except TypeError:
        return result
    if key not in _known:
        _known[key] = _ask(call)
    orders = _known[key]
    if not any(orders):
        return result
    tensors = list(tensors_in(result))
    laid_out = [t if order is None else _laid_out(t, order) for t, order in zip(tensors, orders, strict=True)]
    return laid_out[0] if isinstance(result, Tensor) else type(result)(fill(call.output_spec, laid_out))


def _contiguous(slot: Any) -> bool:
    return bool(slot.meta.stride == dense_strides(slot.meta.shape, tuple(range(len(slot.meta.shape)))))


def dense_strides(shape: tuple[int, ...], order: Order) -> tuple[int, ...]:
    """The strides of a tensor without gaps whose dimensions lie in memory in ``order``.

    >>> dense_strides((2, 3, 4), (0, 2, 1))
    (12, 1, 3)
    """
    strides, step = [0] * len(shape), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


def _order(meta: TensorMeta) -> Order | None:
    """The order of a tensor without gaps; None for others, and where sizes of 1 leave it open."""
    order = tuple(sorted(range(len(meta.shape)), key=lambda dim: (-meta.stride[dim], dim)))
    return order if dense_strides(meta.shape, order) == meta.stride and 1 not in meta.shape else None


def _ask(call: Call) -> tuple[Order | None, ...]:
    """Per result: the order the real kernel gives it, where the fake one gives another."""
    small = shrunk_call(call)
    unchanged: tuple[Order | None, ...] = (None,) * len(call.outputs)
    try:
        with unset_fake_temporarily(), torch.no_grad(), undisturbed():
            tensors = [stand_in(slot.meta, real=True) for slot in small.inputs]
            made = list(tensors_in(call.target(*fill(small.args, tensors), **fill(small.kwargs, tensors))))
    except Exception:  # made-up values, or sizes, that the op refuses
        return unchanged
    if [tuple(t.shape) for t in made] != [slot.meta.shape for slot in small.outputs]:
        return unchanged
    found: list[Order | None] = []
    for tensor, slot in zip(made, call.outputs, strict=True):
        real = _order(TensorMeta(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, "cpu"))
        differs = real is not None and dense_strides(slot.meta.shape, real) != slot.meta.stride
        found.append(real if differs else None)
    return tuple(found)


def _laid_out(tensor: Tensor, order: Order) -> Tensor:
    shape = tuple(tensor.shape)
    return torch.empty_strided(shape, dense_strides(shape, order), dtype=tensor.dtype, device=tensor.device)
