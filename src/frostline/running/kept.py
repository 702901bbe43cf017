"""What autograd alone keeps at a moment of a step, found without saved-tensor hooks: those change what is kept."""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from frostline.kernels import Holder, is_replaced, settle
from frostline.probing.storages import attributes, lazy_addresses, lies_at, living, storages_of


class Seen:
    """Storages that a step's ops were given or made. Held weakly, so that no address is taken again."""

    def __init__(self) -> None:
        self.found: dict[int, StorageWeakRef] = {}
        self.made: dict[int, StorageWeakRef] = {}

    def given(self, values: Any) -> None:
        for storage in storages_of(values):
            if storage._cdata not in self.made and storage._cdata not in self.found:
                self.found[storage._cdata] = StorageWeakRef(storage)

    def returned(self, values: Any) -> None:
        for storage in storages_of(values):
            if storage._cdata not in self.made and storage._cdata not in self.found:
                self.made[storage._cdata] = StorageWeakRef(storage)


def kept_when_returned(seen: Seen, loss: Tensor, model: nn.Module) -> dict[int, int]:
    """`kept_storages` of the graph behind a loss that has just returned."""
    gc.collect()
    settle()
    return kept_storages(seen, graph([loss.grad_fn]), [loss], model)


def kept_storages(seen: Seen, nodes: list[Any], roots: Any, model: nn.Module) -> dict[int, int]:
    """The storages that the graph keeps, by key, in bytes: no parameters and no buffers.

    That is what its nodes saved and what it would put a gradient on; and of what the step made whatever lives on and
    nobody else holds: neither the model's modules nor a variable of a function that is running.

    Args:
        nodes: every node of the graph.
        roots: what backward starts from: the loss.
    """
    parameters = list(model.parameters())
    registered = _keys([*parameters, *model.buffers(), *(parameter.grad for parameter in parameters)])
    elsewhere = _keys([roots, *(attributes(module) for module in model.modules()), *_variables(sys._getframe(1))])
    saved = _keys([each for node in nodes for each in saved_by(node)])
    candidates = {**seen.found, **seen.made}
    keep = (saved & candidates.keys()) | (seen.made.keys() - elsewhere)
    lent = lazy_addresses(model.buffers())
    kept = {
        key: storage.nbytes()
        for key, storage in living(candidates)
        if key in keep - registered and not lies_at(storage, lent)
    }
    for storage in storages_of([each for node in nodes if is_replaced(node) for each in saved_by(node)]):
        if storage._cdata not in registered:
            kept[storage._cdata] = storage.nbytes()  # (bits that our kernels made, unseen)
    return kept


def saved_by(node: Any) -> Iterator[Any]:
    """What a node of the autograd graph saved, or would put a gradient on; nothing is unpacked, nothing recomputed."""
    if hasattr(node, "variable"):
        yield node.variable
    for value in getattr(node, "__dict__", {}).values():  # a Function may keep tensors past torch's own list
        yield (value.kept, value.packed) if isinstance(value, Holder) else value
    kind: Any = type(node)
    for name in _saved_names(kind):
        with suppress(RuntimeError):  # let go already
            raw = getattr(node, name)
            for each in raw if isinstance(raw, (tuple, list)) else (raw,):
                yield getattr(each, "data", None)  # (what a hook of the user's made of it may be anything)


@functools.cache
def _saved_names(kind: type) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))


def _keys(values: Any) -> set[int]:
    return {storage._cdata for storage in storages_of(values)}


def _variables(frame: FrameType | None) -> Iterator[Any]:
    """The tensors that running functions hold: in variables, in containers and as attributes of what these name."""
    while frame is not None:
        for value in list(frame.f_locals.values()):
            yield value
            if isinstance(value, torch.Tensor) or not hasattr(value, "__dict__"):
                continue
            if not isinstance(value, (type, nn.Module)) and isinstance(vars(value), Mapping):
                yield list(vars(value).values())
        frame = frame.f_back


def graph(roots: list[Any]) -> list[Any]:
    """Every node behind ``roots``, each after all that are behind it."""
    done: dict[Any, None] = {}
    stack = [(root, False) for root in roots if root is not None]
    while stack:
        node, expanded = stack.pop()
        if node in done:
            continue
        if expanded:
            done[node] = None
            continue
        stack.append((node, True))
        stack.extend((behind, False) for behind, _ in node.next_functions if behind is not None and behind not in done)
    return list(done)
