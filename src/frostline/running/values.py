"""Whether tensors changed, by their values: versions do not see fused optimizers, running statistics or ``.data``."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


def digests(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, bytes | None]:
    """A checksum of each tensor's bits, by name; None where they cannot be read (on ``meta``, say)."""
    return {name: _digest(tensor) for name, tensor in tensors}


def changed(before: Mapping[str, bytes | None], after: Mapping[str, bytes | None]) -> list[str]:
    """The names whose tensor changed, came or went."""
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is numbers in memory and nothing else: not sparse, fake, on ``meta``, or wrapped."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_nested
    return plain and tensor.device.type != "meta" and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _digest(tensor: Tensor) -> bytes | None:
    try:
        parts = [tensor._indices(), tensor._values()] if tensor.layout is torch.sparse_coo else [tensor]
        digest = hashlib.blake2b(str((tuple(tensor.shape), tensor.dtype)).encode())
        for part in parts:
            plain = part.detach().resolve_conj().resolve_neg().contiguous().cpu()
            digest.update(_memory(plain))
    except (RuntimeError, NotImplementedError, TypeError):
        return None
    return digest.digest()


def _memory(tensor: Tensor) -> ctypes.Array[ctypes.c_char]:
    """The memory of a contiguous tensor, while it lives. (After ``.numpy()`` a storage can no more be resized.)

    Raises:
        TypeError: it has none that can be read.
    """
    nbytes = tensor.numel() * tensor.element_size()
    address = 0 if isinstance(tensor, FakeTensor) else tensor.data_ptr()
    if nbytes and not address:
        raise TypeError("nothing lies in memory")
    return (ctypes.c_char * nbytes).from_address(address) if nbytes else (ctypes.c_char * 0)()
