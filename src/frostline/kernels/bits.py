"""Eight yes-or-no answers a byte, and what is made from them: ones and zeros, or a gradient let through or scaled.

These are the ops ``frostline::unpack_bits`` and ``frostline::let_through``. Packing is done aside (see `holding`), and
is not an op. On CPU the loops of ``_loops.c`` do the work, one pass over memory; where that was not built, numpy does,
a block at a time, in two to three times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from math import prod
from typing import Any

import numpy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .unseen import unseen

try:
    from . import _loops
except ImportError:  # no C compiler was there
    _loops = None  # type: ignore[assignment]

_TOGETHER = sum(1 << 56 - 7 * place for place in range(8))  # takes bit 8 * place to bit 56 + place
_BLOCK = 1 << 17  # elements whose answers lie in a cache

_library = torch.library.Library("frostline", "DEF")
_library.define("unpack_bits(Tensor bits, SymInt[] size, SymInt[] stride, ScalarType dtype) -> Tensor")
_library.define("let_through(Tensor gradient, Tensor bits, float? scale) -> Tensor")


class NoBitsError(Exception):
    """Raised by a condition: a bit cannot say it."""


@dataclass(frozen=True, slots=True)
class Condition:
    """What is asked of each element: whether it is ``above`` a bound, ``not up to`` it, or ``between`` two.

    They differ on NaN, which is not above a bound, and not up to it either; of `between`, it is not said.
    """

    kind: int
    low: float
    high: float = 0.0

    def __call__(self, values: Any) -> Any:
        """Bools, of an array or a tensor."""
        if self.kind == _ABOVE:
            return values > self.low
        if self.kind == _NOT_UP_TO:
            return ~(values <= self.low)
        if len(values) and (least := values.min()) != least:
            raise NoBitsError
        answers = values > self.low
        answers &= values < self.high
        return answers


_NOT_UP_TO, _ABOVE, _BETWEEN = range(3)  # as in _loops.c


def not_up_to(bound: float) -> Condition:
    return Condition(_NOT_UP_TO, bound)


def above(bound: float) -> Condition:
    return Condition(_ABOVE, bound)


def between(low: float, high: float) -> Condition:
    """Above the one and below the other; packing raises `NoBitsError` where there is a NaN."""
    return Condition(_BETWEEN, low, high)


def packed_nbytes(count: int) -> int:
    return (count + 7) // 8


def pack_bits(tensor: Tensor, condition: Condition | Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """A bit for each element of ``tensor``, in the order in which they lie in memory: whether it meets ``condition``.

    Args:
        tensor: one without gaps.
        condition: a half is compared as a float. None: the tensor is of bools already. On accelerators, which have
            no `Condition` of NaN alike, any function of a tensor.

    Raises:
        NoBitsError: the condition raised it.
    """
    count = tensor.numel()
    if isinstance(tensor, FakeTensor):
        return torch.empty(packed_nbytes(count), dtype=torch.uint8, device=tensor.device)
    if not tensor.is_cpu:
        flat = _flat(tensor)
        return _packed(flat, flat) if condition is None else _packed(condition(_wide(flat)))
    bits = torch.empty(packed_nbytes(count), dtype=torch.uint8, device="cpu")
    if not isinstance(condition, Condition):
        answers = _flat(tensor) if condition is None else condition(_flat(tensor))
        bits.numpy()[:] = numpy.packbits(answers.numpy(), bitorder="little")
    elif tensor.dtype.itemsize < 4:
        flat = _flat(tensor)
        for start in range(0, count, _BLOCK):
            block = flat[start : start + _BLOCK].float()
            _pack(block, len(block), condition, bits[start // 8 :])
    else:
        _pack(tensor, count, condition, bits)
    return bits


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _pack(tensor: Tensor, count: int, condition: Condition, bits: Tensor) -> None:
    if _loops is not None:
        how = condition.kind, tensor.dtype.itemsize, tensor.data_ptr(), count, condition.low, condition.high
        if _loops.pack(*how, bits.data_ptr()) and condition.kind == _BETWEEN:
            raise NoBitsError
        return
    values, packed = _flat(tensor).numpy(), bits.numpy()
    for start in range(0, count, _BLOCK):
        found = numpy.packbits(condition(values[start : start + _BLOCK]), bitorder="little")
        packed[start // 8 : start // 8 + len(found)] = found


def _packed(answers: Tensor, given: Tensor | None = None) -> Tensor:
    """Of bools, without numpy: a product brings eight of them, read as one integer, together in its last byte.

    Args:
        given: what is not to be written to, if the answers may be that itself.
    """
    missing = -len(answers) % 8
    if missing:
        answers = torch.cat([answers, answers.new_zeros(missing)])
    eights = answers.view(torch.int64)
    eights = eights.mul(_TOGETHER) if answers is given else eights.mul_(_TOGETHER)
    return eights.bitwise_right_shift_(56).to(torch.uint8)


def _answers(bits: Tensor) -> Tensor:
    """Bools again, eight a row."""
    return (bits[:, None] >> _places(bits.device)).bitwise_and_(1).view(torch.bool)


@cache
def _places(device: torch.device) -> Tensor:
    with unseen():
        return torch.arange(8, dtype=torch.uint8, device=device)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize < 4 else tensor


@cache
def _each_byte(dtype: torch.dtype) -> Tensor:
    """The ones and zeros that each byte stands for."""
    return (torch.arange(256, device="cpu")[:, None] >> torch.arange(8, device="cpu")).bitwise_and_(1).to(dtype)


_AS_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _unpack(bits: Tensor, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    if bits.device.type != "cpu":
        return _over(_answers(bits).to(dtype), size, stride, dtype)
    rows = bits.new_empty((len(bits), 8), dtype=_AS_INTEGER[dtype.itemsize])
    _each_byte(dtype).view(rows.dtype).numpy().take(bits.numpy(), axis=0, out=rows.numpy(), mode="wrap")
    return _over(rows, size, stride, dtype)


def _unpack_nothing(bits: Tensor, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    return _over(bits.new_empty((packed_nbytes(prod(size)), 8), dtype=dtype), size, stride, dtype)


def _over(rows: Tensor, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The memory of ``rows`` in another shape: no view, so that the engine may add to it in place."""
    empty = rows.new_empty(0, dtype=dtype)
    return empty.set_(rows.untyped_storage(), 0, size, stride)


@lru_cache(maxsize=64)
def _table(dtype: torch.dtype, scale: float | None) -> Any:
    """For each byte, what its bits do to a gradient: all ones or all zeros as wide as it; or factors, scale or 0."""
    if scale is None:
        return _each_byte(_AS_INTEGER[dtype.itemsize]).neg().numpy()
    return (_each_byte(dtype) * scale).numpy()


def _let_through(gradient: Tensor, bits: Tensor, scale: float | None) -> Tensor:
    count, dtype = gradient.numel(), gradient.dtype
    if scale is not None and dtype.itemsize < 4:
        return _let_through_elsewhere(gradient, bits, scale)
    result = torch.empty_like(gradient)
    if _loops is None:
        _let_through_by_blocks(gradient.detach(), bits, scale, result)
    elif scale is None:
        _loops.let_through(dtype.itemsize, gradient.data_ptr(), bits.data_ptr(), count, result.data_ptr())
    else:
        _loops.scale(dtype.itemsize, gradient.data_ptr(), bits.data_ptr(), count, scale, result.data_ptr())
    return result


def _let_through_by_blocks(gradient: Tensor, bits: Tensor, scale: float | None, result: Tensor) -> None:
    """So that what the bits stand for never leaves the cache."""
    count, dtype = gradient.numel(), gradient.dtype
    flat = [t.as_strided((count,), (1,)) for t in (gradient, result)]
    given, found = ((t if scale is not None else t.view(_AS_INTEGER[dtype.itemsize])).numpy() for t in flat)
    combine = numpy.bitwise_and if scale is None else numpy.multiply
    table, packed = _table(dtype, scale), bits.numpy()
    factors = numpy.empty((_BLOCK // 8, 8), table.dtype)
    with numpy.errstate(all="ignore"):
        for start in range(0, count, _BLOCK):
            part, stop = packed[start // 8 : (start + _BLOCK) // 8], min(start + _BLOCK, count)
            table.take(part, axis=0, out=factors[: len(part)], mode="wrap")
            combine(given[start:stop], factors.reshape(-1)[: stop - start], out=found[start:stop])


def _let_through_elsewhere(gradient: Tensor, bits: Tensor, scale: float | None) -> Tensor:
    size, stride, dtype = gradient.shape, gradient.stride(), gradient.dtype
    if scale is not None:
        return _unpack(bits, size, stride, dtype).mul_(scale).mul_(gradient)
    count = gradient.numel()
    return _over(
        torch.where(_answers(bits).view(-1)[:count], gradient.as_strided((count,), (1,)), 0.0), size, stride, dtype
    )


_library.impl("unpack_bits", _unpack_nothing, "Meta")
_library.impl("let_through", lambda gradient, bits, scale: torch.empty_like(gradient), "Meta")
_library.impl("let_through", _let_through, "CPU")
for _backend in ("CPU", "CUDA", "XPU", "MPS"):
    _library.impl("unpack_bits", _unpack, _backend)
    if _backend != "CPU":
        _library.impl("let_through", _let_through_elsewhere, _backend)
_op = torch.ops.frostline.unpack_bits.default
_keys = torch._C._dispatch_keys


def unpack_bits(bits: Tensor, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Ones for the bits that are set and zeros for the others; ``size`` and ``stride`` leave no gaps."""
    return _op(bits, size, stride, dtype)  # type: ignore[no-any-return]


def let_through(gradient: Tensor, bits: Tensor, scale: float | None = None) -> Tensor:
    """``gradient`` where the bits are set, and 0 elsewhere; with a ``scale``, multiplied by that or by 0.

    Args:
        gradient: one without gaps, that lies in memory as what was packed did.
    """
    if (
        _keys(gradient).raw_repr() == _keys(bits).raw_repr()
        and bits.is_cpu
        and not torch._C._len_torch_dispatch_stack()
    ):
        return _let_through(gradient, bits, scale)  # as plain as the bits: nobody would see the op, which takes as long
    return torch.ops.frostline.let_through.default(gradient, bits, scale)  # type: ignore[no-any-return]
