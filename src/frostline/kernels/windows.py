"""Where in its window a maximum was: one byte, and the index into the input made again from it.

The making is the op ``frostline::widen``. Narrowing is done aside (see `holding`), and is not an op. On CPU the loops
of ``_loops.c`` do both, in one pass; elsewhere, or where that was not built, torch's own ops do.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, reduce
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .lean import NotCoveredError
from .unseen import unseen

try:
    from . import _loops
except ImportError:  # no C compiler was there
    _loops = None  # type: ignore[assignment]

NUM_BYTES = 256
_library = torch.library.Library("frostline", "FRAGMENT")
_library.define("widen(Tensor packed, int[] first, int[] apart, int[] offsets) -> Tensor")

Numbers = tuple[int, ...]


class Windows(NamedTuple):
    """The windows of a pool.

    Attributes:
        first: the index, if it were in the input, at which the first window of each dimension begins.
        apart: how far the windows of each dimension are apart.
        offsets: how far each element of a window is from where it begins; empty if a byte can tell that itself.
    """

    first: Numbers
    apart: Numbers
    offsets: Numbers

    def pack(self, indices: Tensor) -> Tensor:
        return narrow(indices, *self)

    def unpack(self, packed: Tensor) -> Tensor:
        return _widen_op(packed, *self)  # type: ignore[no-any-return]


@lru_cache(maxsize=256)
def windows_of(shape: Numbers, kernel: Numbers, stride: Numbers, padding: Numbers, dilation: Numbers) -> Windows:
    """The windows of a pool over an input that ends in ``shape``, of as many dimensions as the pool.

    Raises:
        NotCoveredError: a byte cannot tell; or a window may have no element of the input, where an index means nothing;
            or torch refuses the pool.
    """
    dims = len(shape)
    kernel, padding, dilation = (given * dims if len(given) == 1 else given for given in (kernel, padding, dilation))
    stride = (stride * dims if len(stride) == 1 else stride) or kernel
    if {len(kernel), len(stride), len(padding), len(dilation)} != {dims} or min(kernel) < 1:
        raise NotCoveredError("torch refuses it")
    if prod(kernel) > NUM_BYTES:
        raise NotCoveredError("a place in its window takes more than a byte")
    if any(d != 1 and p != 0 for d, p in zip(dilation, padding, strict=True)):
        raise NotCoveredError("a window may have no element of the input")
    steps = [prod(shape[dim + 1 :]) for dim in range(dims)]
    first = tuple(-p * step for p, step in zip(padding, steps, strict=True))
    apart = tuple(s * step for s, step in zip(stride, steps, strict=True))
    along = [[i * d * step for i in range(k)] for k, d, step in zip(kernel, dilation, steps, strict=True)]
    offsets = tuple(map(sum, product(*along)))
    return Windows(first, apart, () if offsets[-1] < NUM_BYTES else offsets)


def narrow(indices: Tensor, first: Numbers, apart: Numbers, offsets: Numbers) -> Tensor:
    """For each index of a pool's result the byte that `widen` makes it from again. See `Windows`."""
    packed = torch.empty_like(indices, dtype=torch.uint8)
    if isinstance(indices, FakeTensor):
        return packed
    numbers = _tables(offsets, indices.device)[1] if offsets else None
    places = _places(indices, packed, first, apart)
    if places is not None:
        table = 0 if numbers is None else numbers.data_ptr()
        _loops.narrow(*places, indices.data_ptr(), table, packed.data_ptr())
        return packed
    offset = indices - _starts(indices, first, apart)
    return packed.copy_(offset if numbers is None else numbers[offset])


def _widen(packed: Tensor, first: Sequence[int], apart: Sequence[int], offsets: Sequence[int]) -> Tensor:
    indices = torch.empty_like(packed, dtype=torch.int64)
    steps = _tables(tuple(offsets), packed.device)[0] if offsets else None
    places = _places(packed, indices, first, apart)
    if places is not None:
        table = 0 if steps is None else steps.data_ptr()
        _loops.widen(*places, packed.data_ptr(), table, indices.data_ptr())
        return indices
    indices.copy_(packed if steps is None else steps[packed.to(torch.int64)])
    return indices.add_(_starts(packed, first, apart))


def _widen_nothing(packed: Tensor, first: Sequence[int], apart: Sequence[int], offsets: Sequence[int]) -> Tensor:
    return torch.empty_like(packed, dtype=torch.int64)


def _places(
    source: Tensor, target: Tensor, first: Sequence[int], apart: Sequence[int]
) -> tuple[int, Any, int, Any, Any] | None:
    """For the loops, how the places of both lie in memory, and where their windows begin; None: they cannot do it."""
    num, dims, shape = len(apart), source.dim(), source.shape
    if _loops is None or not source.is_cpu or source.stride() != target.stride():
        return None
    missing = (0,) * (3 - num)
    begin = (*missing, *first), (*missing, *apart)
    sizes = (*(1 for _ in missing), *shape[dims - num :])
    if source.is_contiguous():
        return prod(shape[: dims - num]), sizes, 1, *begin
    if dims == num + 2 and source.is_contiguous(memory_format=_CHANNELS_LAST[num]):
        return shape[0], sizes, shape[1], *begin
    return None


_CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def _starts(like: Tensor, first: Sequence[int], apart: Sequence[int]) -> Tensor:
    """The index, if it were in the input, of the first element of each place's window."""
    along = []
    for dim in range(-len(apart), 0):
        places = torch.arange(like.shape[dim], device=like.device).mul_(apart[dim]).add_(first[dim])
        along.append(places.view(-1, *(1,) * (-1 - dim)))
    return reduce(torch.add, along)


def _tables(offsets: Numbers, device: torch.device) -> tuple[Tensor, Tensor]:
    """The offset of each element of a window by its number, and the number by its offset."""
    with unseen():
        return _kept_tables(offsets, device)


@lru_cache(maxsize=64)  # (making them, an accelerator would be waited for)
def _kept_tables(offsets: Numbers, device: torch.device) -> tuple[Tensor, Tensor]:
    table = torch.zeros(NUM_BYTES, dtype=torch.int64, device=device)
    table[: len(offsets)] = torch.tensor(offsets, device=device)
    number = torch.zeros(offsets[-1] + 1, dtype=torch.uint8, device=device)
    number[table[: len(offsets)]] = torch.arange(len(offsets), dtype=torch.uint8, device=device)
    return table, number


_library.impl("widen", _widen_nothing, "Meta")
for _backend in ("CPU", "CUDA", "XPU", "MPS"):
    _library.impl("widen", _widen, _backend)
_widen_op = torch.ops.frostline.widen.default
