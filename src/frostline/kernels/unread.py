"""Stand-ins for tensors that a backward op takes but does not read: a shape, strides and a dtype, without memory.

Eager's own backward op chooses its kernel, and the strides of what it returns, by the tensors that the forward had. So
it is given one that looks the same. On CPU these all lie in one mapping of memory that is never written to: the system
gives no page to it, and a kernel that does read it (to compute what nobody asked for) finds zeros.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from .unseen import transforming, unseen

_MAPS = hasattr(mmap, "MAP_PRIVATE")
_lock = threading.Lock()
_memory = torch.UntypedStorage(0)
_places: set[int] = set()  # where such memory begins


class Looks(NamedTuple):
    """What a kernel can know of a tensor that it does not read."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Looks:
        return tuple.__new__(cls, (tensor.shape, tensor.stride(), tensor.dtype))  # (a frame fewer than ``cls(...)``)

    @property
    def nbytes(self) -> int:
        if 0 in self.shape:
            return 0
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize

    @property
    def is_dense(self) -> bool:
        """Whether its elements fill a stretch of memory, in whatever order, each in a place of its own."""
        return _is_dense(self.shape, self.stride)


def lies_alike(gradient: Tensor, looks: Looks) -> bool:
    """Whether a gradient lies in memory as a tensor of those looks did, and nothing is to be derived from this."""
    if gradient._is_zerotensor() or torch.is_grad_enabled() or transforming():
        return False
    return Looks.of(gradient) == looks


@lru_cache(maxsize=1024)
def _is_dense(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for step, size in sorted((t, s) for s, t in zip(shape, stride, strict=True) if s != 1):
        if step != expected:
            return 0 in shape
        expected *= size
    return True


def unread(looks: Looks, beside: Tensor) -> Tensor:
    """A tensor that looks like ``looks``, on the device of ``beside`` and as fake as that; its contents mean little."""
    return unread_later(looks, beside)()


def unread_later(looks: Looks, beside: Tensor) -> Callable[[], Tensor]:
    """What makes it."""
    if isinstance(beside, FakeTensor):
        return partial(_fake, looks, beside.fake_mode, beside.device)
    if _MAPS and beside.is_cpu:
        return partial(_on_cpu, looks)
    return partial(_elsewhere, looks, beside.device)


def _fake(looks: Looks, mode: FakeTensorMode, device: torch.device) -> Tensor:
    with unseen():
        looking = torch.empty_strided(looks.shape, looks.stride, dtype=looks.dtype, device="meta")
        return FakeTensor(mode, looking, device)


def _elsewhere(looks: Looks, device: torch.device) -> Tensor:
    with unseen(), torch._C._AutoDispatchBelowAutograd():
        return torch.empty_strided(looks.shape, looks.stride, dtype=looks.dtype, device=device)


@lru_cache(maxsize=1024)
def _on_cpu(looks: Looks) -> Tensor:
    with unseen(), torch.no_grad():
        empty = torch.empty(0, dtype=looks.dtype, device="cpu")
        return empty.set_(_untouched(looks.nbytes), 0, looks.shape, looks.stride)


def _untouched(nbytes: int) -> torch.UntypedStorage:
    """Memory that nothing writes to, at least so much of it; the one before lives as long as it is in use."""
    global _memory
    with _lock:
        if _memory.nbytes() < nbytes:
            size = max(nbytes, 2 * _memory.nbytes(), 1 << 26)
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
            mapped: Any = mmap.mmap(-1, size, flags=flags)
            _memory = torch.frombuffer(mapped, dtype=torch.uint8).untyped_storage()
            _places.add(_memory.data_ptr())
        return _memory


def takes_no_memory(storage: torch.UntypedStorage) -> bool:
    """Whether it is the mapping that such tensors lie in: addresses, and not a page of memory."""
    return storage.data_ptr() in _places
