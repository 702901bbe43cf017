"""Which storages there are: those of tensors, those still alive, and those a graph or a module holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

_C: Any = torch._C


def storages_of(value: Any) -> Iterator[torch.UntypedStorage]:
    """The storage of every tensor in ``value``; of a sparse one, of its indices and values."""
    for leaf in tree_leaves(value):
        if not isinstance(leaf, Tensor):
            continue
        if leaf.layout is torch.sparse_coo:
            yield from storages_of([leaf._indices(), leaf._values()])
            continue
        with contextlib.suppress(NotImplementedError, RuntimeError):  # other layouts have no storage of their own
            yield leaf.untyped_storage()


def living(references: dict[int, StorageWeakRef]) -> Iterator[tuple[int, torch.UntypedStorage]]:
    for key, reference in references.items():
        storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
        if storage is not None:
            yield key, storage


def lazy_addresses(tensors: Iterable[Tensor]) -> set[int]:
    """Where the memory begins that tensors share with copies of theirs that are to be made when somebody writes."""
    return {_C._data_address(t) for t in tensors if type(t) is Tensor and _C._is_cow_tensor(t)}


def lies_at(storage: torch.UntypedStorage, addresses: set[int]) -> bool:
    """Whether a storage is such a copy, still to be made, of what begins at one of ``addresses``."""
    if not addresses or storage.device.type == "meta":
        return False
    tensor = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
    return _C._is_cow_tensor(tensor) and _C._data_address(tensor) in addresses


def attributes(module: nn.Module) -> list[Any]:
    """What a module has besides its parameters, buffers and modules."""
    registered = ("_parameters", "_buffers", "_modules")
    return [value for name, value in vars(module).items() if name not in registered]
