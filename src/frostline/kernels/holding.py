"""Holding a tensor that costs nothing while something else keeps it, and its few bits from then on.

A ReLU's result is often kept by the next op as well. Then its bits would come on top of it, and more would be kept than
by eager. So a node starts by holding the tensor itself, as eager does, and packs it as soon as nobody else has its
storage: when the tensor dies, or, if something else kept the storage then, at the next look.

The tensor held is an alias that shares storage and version counter with the one watched, which is what tells that an
in-place op wrote to it. A node's own tensors are let go as its backward goes, as torch does with saved tensors.
"""

from __future__ import annotations

import sys
import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .unseen import aside

_SHORT = 16  # as many of those whose tensor died while something else had its storage are looked at at once

waiting: deque[weakref.ref[Holder]] = deque()
"""Those for which `look_again` is to be called."""
_live: dict[int, weakref.ref[Holder]] = {}  # by id
_having: defaultdict[int, set[int]] = defaultdict(set)  # storage -> the holders (by id) that have an alias of it

# (Asked at every op: see `lean`.)
_is_grad_enabled = torch.is_grad_enabled
_graph_task, _keeps_graph = torch._C._current_graph_task_id, torch._C._autograd._get_current_graph_task_keep_graph
_use_count = torch._C._storage_Use_Count


def _died(reference: weakref.ref[Holder], _watch: Any) -> None:
    holder = None if sys.is_finalizing() else reference()  # (torch is half gone then)
    if holder is not None and not holder.pack_if_alone(num_dying=1):
        waiting.append(reference)  # (a view may be dying, whose base it was, or something else keeps it)


class Holder:
    """What one node keeps of one tensor.

    Args:
        pack: what stands for a tensor; None if its values are such that only the tensor itself will do.
        unpack: what backward reads in place of a tensor, from what stands for it.
        name: says of which node it is which output, for the message when it was written to.
        run: what it is part of.

    Attributes:
        storage_key: tells which storage it holds, or held until it was packed (``storage_key`` of `probing`).
        kept: the tensor itself, until it is packed; None before the forward and after the backward.
        packed: what it was packed to.

    The collector may pack at any moment, in any thread, between any two steps of a backward. So ``packed`` is there
    before ``kept`` goes, each is changed at one stroke, and `take` says which of the two it took.
    """

    # (Of the class until they change: one is made at every op.)
    kept: Tensor | None = None
    packed: Tensor | None = None
    storage_key = 0
    _version = 0
    _watch: weakref.ref[Tensor] | None = None

    def __init__(
        self,
        pack: Callable[[Tensor], Tensor | None],
        unpack: Callable[[Tensor], Tensor],
        name: str,
        run: object = None,
    ) -> None:
        self.run = run
        self._pack = pack
        self._unpack = unpack
        self._name = name

    def hold(self, tensor: Tensor) -> None:
        """Begin to hold ``tensor`` with the values that it has now. To be called `aside`."""
        kept = self.kept = tensor.detach()
        key = self.storage_key = kept.untyped_storage()._cdata
        self._version = kept._version
        _having[key].add(id(self))
        _live[id(self)] = weakref.ref(self)

    def hold_packed(self, packed: Tensor) -> None:
        """Begin to hold what was packed already, where eager keeps a copy that nobody else can have."""
        self.packed = packed
        _live[id(self)] = weakref.ref(self)

    def watch(self, tensor: Tensor) -> None:
        """Pack when ``tensor`` is gone: the Python object that user code has of the tensor held.

        Autograd's views of it and nodes that saved it keep it alive.
        """
        kept = self.kept
        assert kept is not None
        self._version = kept._version  # (autograd counts a Function that writes to its input as one more write)
        self._watch = weakref.ref(tensor, partial(_died, weakref.ref(self)))

    def pack_if_alone(self, num_dying: int = 0) -> bool:
        """Pack if only holders have the storage; returns whether there is nothing more to be done.

        Args:
            num_dying: tensors that still have the storage while they are being taken apart.
        """
        kept = self.kept
        if kept is None:
            return True
        if _graph_task() != -1 and not _is_grad_enabled():
            return False  # backward is letting go of things, and will come to this node
        if kept._version != self._version:
            return True
        key = self.storage_key
        storage = kept.untyped_storage()  # (its Python object has the storage, too)
        if _use_count(key) > len(_having.get(key, ())) + 1 + num_dying:
            return False
        del storage
        with aside(kept):
            packed = self._pack(kept)
        if packed is not None:
            self.packed = packed
            self._forget()
        return True

    @property
    def packed_nbytes(self) -> int:
        """What it keeps takes, once it is packed."""
        packed = self.packed
        return packed.nbytes if packed is not None and self.kept is None else 0

    def _forget(self) -> None:
        if vars(self).pop("kept", None) is not None:
            key = self.storage_key
            having = _having[key]
            having.discard(id(self))
            if not having:
                _having.pop(key, None)

    def take(self) -> tuple[Tensor, bool]:
        """What it keeps, and whether that was packed. Let go of it if this backward is the last.

        Raises:
            RuntimeError: as eager's, where the tensor was written to since.
        """
        kept = self.kept
        packed = None if kept is not None else self.packed
        if kept is not None and kept._version != self._version:
            raise modified(kept, self._version, self._name)
        if not _keeps_graph():
            self._forget()
            self.packed = None
        taken = packed if kept is None else kept
        assert taken is not None, "torch raises at the second backward, before this"
        return taken, kept is None

    def unpacked(self, packed: Tensor) -> Tensor:
        """What backward reads in place of the tensor."""
        return self._unpack(packed)

    def __del__(self, live: dict[int, weakref.ref[Holder]] = _live) -> None:  # (globals may be gone at the end)
        self._forget()
        live.pop(id(self), None)


def modified(tensor: Tensor, expected: int, which: str = "") -> RuntimeError:
    """What eager raises where a saved tensor was written to since."""
    kind = f"{tensor.type()} {list(tensor.shape)}"
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"[{kind}]{f', which {which},' if which else ''} is at version {tensor._version}; expected version {expected} "
        "instead. Hint: enable anomaly detection to find the operation that failed to compute its gradient, "
        "with torch.autograd.set_detect_anomaly(True)."
    )


def look_again() -> None:
    """Pack some of those that could not be when their tensor died, and now can: the next few in turn."""
    _look(_SHORT)


def look_at_all() -> None:
    """Pack all that could not be when their tensor died, and now can."""
    _look(len(waiting))


def _look(times: int) -> None:
    for _ in range(min(times, len(waiting))):
        try:
            reference = waiting.popleft()
        except IndexError:  # the collector ran meanwhile, and looked
            return
        holder = reference()
        if holder is not None and not holder.pack_if_alone():
            waiting.append(reference)


def collected(phase: str, _info: Any) -> None:
    """For ``gc.callbacks``: after the last op of ours in a step nothing else would look."""
    if phase == "stop":
        look_at_all()


def settle() -> None:
    """Pack all that can be packed, wherever it is held."""
    for holder in live_holders():
        holder.pack_if_alone()


def live_holders() -> list[Holder]:
    return [holder for reference in list(_live.values()) if (holder := reference()) is not None]
