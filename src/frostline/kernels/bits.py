"""Eight yes-or-no answers a byte, and ones and zeros made from them: the op ``frostline::unpack_bits``.

Packing is done aside (see `holding`), and is not an op. On CPU numpy does the work, a block at a time: its comparisons
and its look-up in a table take a quarter of the time of torch's.
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


_library.impl("unpack_bits", _unpack_nothing, "Meta")
for _backend in ("CPU", "CUDA", "XPU", "MPS"):
    _library.impl("unpack_bits", _unpack, _backend)
_op = torch.ops.frostline.unpack_bits.default


def unpack_bits(bits: Tensor, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Ones for the bits that are set and zeros for the others; ``size`` and ``stride`` leave no gaps."""
    return _op(bits, size, stride, dtype)  # type: ignore[no-any-return]
