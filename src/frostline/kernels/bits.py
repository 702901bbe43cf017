"""Eight yes-or-no answers a byte, and what is made from them: ones and zeros, or a gradient let through.

These are the ops ``frostline::unpack_bits`` and ``frostline::let_through``. Packing is done aside (see `holding`), and
is not an op. On CPU numpy does the work, a block at a time: its comparisons and its look-up in a table take a quarter
of the time of torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any

import numpy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

_BLOCK = 1 << 17  # elements whose answers lie in a cache

_library = torch.library.Library("frostline", "DEF")
_library.define("unpack_bits(Tensor bits, SymInt[] size, SymInt[] stride, ScalarType dtype) -> Tensor")
_library.define("let_through(Tensor gradient, Tensor bits) -> Tensor")


def packed_nbytes(count: int) -> int:
    return (count + 7) // 8


def pack_bits(tensor: Tensor, condition: Callable[[Any], Any]) -> Tensor:
    """A bit for each element of ``tensor``, in the order in which they lie in memory: whether it meets ``condition``.

    Args:
        tensor: one without gaps.
        condition: makes bools with Python's operators, of tensors and of arrays; a half is compared as a float.
    """
    count = tensor.numel()
    flat = tensor.detach().as_strided((count,), (1,))
    bits = flat.new_empty(packed_nbytes(count), dtype=torch.uint8)
    if isinstance(tensor, FakeTensor):
        return bits
    if tensor.device.type != "cpu":
        answers = flat.new_zeros(8 * len(bits), dtype=torch.uint8)
        answers[:count] = condition(_wide(flat))
        places = torch.arange(8, dtype=torch.uint8, device=tensor.device)
        return bits.copy_((answers.view(-1, 8) << places).sum(1, dtype=torch.uint8))
    packed = bits.numpy()
    for start in range(0, count, _BLOCK):
        block = _wide(flat[start : start + _BLOCK]).numpy()
        found = numpy.packbits(condition(block), bitorder="little")
        packed[start // 8 : start // 8 + len(found)] = found
    return bits


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize < 4 else tensor


@cache
def _each_byte(dtype: torch.dtype) -> Tensor:
    """The ones and zeros that each byte stands for."""
    return (torch.arange(256)[:, None] >> torch.arange(8)).bitwise_and_(1).to(dtype)


_AS_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _unpack(bits: Tensor, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    table = _each_byte(dtype)
    if bits.device.type == "cpu":
        rows = bits.new_empty((len(bits), 8), dtype=_AS_INTEGER[dtype.itemsize])
        table.view(rows.dtype).numpy().take(bits.numpy(), axis=0, out=rows.numpy(), mode="wrap")
    else:
        rows = table.to(bits.device).index_select(0, bits.to(torch.int32))
    return _over(rows, size, stride, dtype)


def _unpack_nothing(bits: Tensor, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    return _over(bits.new_empty((packed_nbytes(prod(size)), 8), dtype=dtype), size, stride, dtype)


def _over(rows: Tensor, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The memory of ``rows`` in another shape: no view, so that the engine may add to it in place."""
    empty = rows.new_empty(0, dtype=dtype)
    return empty.set_(rows.untyped_storage(), 0, size, stride)


@cache
def _masks(dtype: torch.dtype) -> Any:
    """All ones or all zeros for each bit of a byte, as wide as ``dtype``."""
    return _each_byte(_AS_INTEGER[dtype.itemsize]).neg().numpy()


def _let_through(gradient: Tensor, bits: Tensor) -> Tensor:
    """A block at a time, so that the masks never leave the cache."""
    count, dtype = gradient.numel(), gradient.dtype
    result = torch.empty_like(gradient)
    wide, packed = _AS_INTEGER[dtype.itemsize], bits.numpy()
    given, found = (t.as_strided((count,), (1,)).view(wide).numpy() for t in (gradient.detach(), result))
    table, masks = _masks(dtype), numpy.empty((_BLOCK // 8, 8), given.dtype)
    for start in range(0, count, _BLOCK):
        part, stop = packed[start // 8 : (start + _BLOCK) // 8], min(start + _BLOCK, count)
        table.take(part, axis=0, out=masks[: len(part)], mode="wrap")
        numpy.bitwise_and(given[start:stop], masks.reshape(-1)[: stop - start], out=found[start:stop])
    return result


def _let_through_elsewhere(gradient: Tensor, bits: Tensor) -> Tensor:
    ones = _unpack(bits, gradient.shape, gradient.stride(), gradient.dtype)
    return torch.ops.aten.threshold_backward(gradient, ones, 0)  # type: ignore[no-any-return]


_library.impl("unpack_bits", _unpack_nothing, "Meta")
_library.impl("let_through", lambda gradient, bits: torch.empty_like(gradient), "Meta")
_library.impl("let_through", _let_through, "CPU")
for _backend in ("CPU", "CUDA", "XPU", "MPS"):
    _library.impl("unpack_bits", _unpack, _backend)
    if _backend != "CPU":
        _library.impl("let_through", _let_through_elsewhere, _backend)
_op = torch.ops.frostline.unpack_bits.default


def unpack_bits(bits: Tensor, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Ones for the bits that are set and zeros for the others; ``size`` and ``stride`` leave no gaps."""
    return _op(bits, size, stride, dtype)  # type: ignore[no-any-return]


def let_through(gradient: Tensor, bits: Tensor) -> Tensor:
    """``gradient`` where the bits are set, and 0 elsewhere; it has no gaps, and the bits are in its order."""
    return torch.ops.frostline.let_through.default(gradient, bits)  # type: ignore[no-any-return]
