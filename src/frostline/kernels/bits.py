"""Eight yes-or-no answers a byte: the ops ``frostline::pack_bits`` and ``frostline::unpack_bits``."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor

_library = torch.library.Library("frostline", "DEF")
_library.define("pack_bits(Tensor mask) -> Tensor")
_library.define("unpack_bits(Tensor bits, SymInt count) -> Tensor")


def packed_nbytes(count: int) -> int:
    return (count + 7) // 8


def _pack_on_cpu(mask: Tensor) -> Tensor:
    return torch.from_numpy(numpy.packbits(mask.numpy(), bitorder="little"))


def _unpack_on_cpu(bits: Tensor, count: int) -> Tensor:
    return torch.from_numpy(numpy.unpackbits(bits.numpy(), count=count, bitorder="little")).view(torch.bool)


def _pack(mask: Tensor) -> Tensor:
    bytes_ = mask.new_zeros(8 * packed_nbytes(mask.numel()), dtype=torch.uint8)
    bytes_[: mask.numel()] = mask
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (bytes_.view(-1, 8) << shifts).sum(1, dtype=torch.uint8)


def _unpack(bits: Tensor, count: int) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits[:, None] >> shifts).bitwise_and_(1).view(torch.bool).view(-1)[:count]


_library.impl("pack_bits", _pack_on_cpu, "CPU")
_library.impl("unpack_bits", _unpack_on_cpu, "CPU")
for _backend in ("CUDA", "XPU", "MPS"):
    _library.impl("pack_bits", _pack, _backend)
    _library.impl("unpack_bits", _unpack, _backend)
_library.impl("pack_bits", lambda mask: mask.new_empty(packed_nbytes(mask.numel()), dtype=torch.uint8), "Meta")
_library.impl("unpack_bits", lambda bits, count: bits.new_empty(count, dtype=torch.bool), "Meta")

_pack_bits = torch.ops.frostline.pack_bits.default
_unpack_bits = torch.ops.frostline.unpack_bits.default


def pack_bits(mask: Tensor) -> Tensor:
    """Pack the bools of ``mask``, in the order in which they lie in memory."""
    return _pack_bits(mask.as_strided((mask.numel(),), (1,), 0))  # type: ignore[no-any-return]


def unpack_bits(bits: Tensor, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """The bools that were packed; ``shape`` and ``stride`` are of a tensor without gaps."""
    count = 1
    for size in shape:
        count *= size
    return _unpack_bits(bits, count).as_strided(shape, stride)  # type: ignore[no-any-return]
