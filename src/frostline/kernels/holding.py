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
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .unseen import aside

_SHORT = 16  # as many of those whose tensor died while something else had its storage are looked at again

_waiting: deque[weakref.ref[Holder]] = deque(maxlen=_SHORT)
_live: weakref.WeakSet[Holder] = weakref.WeakSet()
_num_aliases: Counter[int] = Counter()  # storage -> aliases that holders have of it


class _Watch(weakref.ref[Tensor]):
    """Tells a holder that a tensor has died; autograd's views of it and nodes that saved it keep it alive."""

    __slots__ = ("holder",)

    def __init__(self, tensor: Tensor, _callback: Callable[[Any], None], holder: Holder) -> None:
        super().__init__(tensor, _callback)  # type: ignore[call-arg]
        self.holder = weakref.ref(holder)

    def __new__(cls, tensor: Tensor, callback: Callable[[Any], None], holder: Holder) -> _Watch:
        return super().__new__(cls, tensor, callback)


def _died(watch: Any) -> None:
    holder = None if sys.is_finalizing() else watch.holder()  # (torch is half gone then)
    if holder is not None and not holder.pack_if_alone(num_dying=1):
        _waiting.append(watch.holder)  # (a view may be dying, whose base it was, or something else keeps it)


class Holder:
    """What one node keeps of one tensor.

    Args:
        pack: what stands for a tensor; None if its values are such that only the tensor itself will do.
        unpack: what backward reads in place of a tensor, from what stands for it.
        name: says of which node it is which output, for the message when it was written to.
        run: what it is part of.

    Attributes:
        storage_key: tells which storage it holds, or held until it was packed (``storage_key`` of `probing`).
        storage_nbytes: of that storage.
        packed_nbytes: what it takes when nobody else keeps that storage.
        kept: the tensor itself, or what it was packed to; None before the forward and after the backward.
        is_packed: whether ``kept`` is what it was packed to.
    """

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
        self._version = 0
        self._watch: _Watch | None = None
        self.kept: Tensor | None = None
        self.is_packed = False
        self.storage_key = 0
        self.storage_nbytes = 0
        self.packed_nbytes = 0

    def hold(self, tensor: Tensor, packed_nbytes: int) -> None:
        """Begin to hold ``tensor`` with the values that it has now."""
        with aside(tensor):
            self.kept = tensor.detach()
        storage = self.kept.untyped_storage()
        self.storage_key, self.storage_nbytes = storage._cdata, storage.nbytes()
        self.packed_nbytes = packed_nbytes
        self._version = self.kept._version
        _num_aliases[self.storage_key] += 1
        _live.add(self)

    def hold_packed(self, packed: Tensor) -> None:
        """Begin to hold what was packed already, where eager keeps a copy that nobody else can have."""
        self.kept, self.is_packed, self.packed_nbytes = packed, True, packed.nbytes
        _live.add(self)

    def watch(self, tensor: Tensor) -> None:
        """Pack when ``tensor`` is gone: the Python object that user code has of the tensor held."""
        assert self.kept is not None
        self._version = self.kept._version  # (autograd counts a Function that writes to its input as one more write)
        self._watch = _Watch(tensor, _died, self)

    def pack_if_alone(self, num_dying: int = 0) -> bool:
        """Pack if only holders have the storage; returns whether there is nothing more to be done.

        Args:
            num_dying: tensors that still have the storage while they are being taken apart.
        """
        if self.kept is None or self.is_packed:
            return True
        if torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled():
            return False  # backward is letting go of things, and will come to this node
        if self.kept._version != self._version:
            return True
        storage = self.kept.untyped_storage()  # (its Python object has the storage, too)
        if torch._C._storage_Use_Count(storage._cdata) > _num_aliases[self.storage_key] + 1 + num_dying:
            return False
        del storage
        with torch.no_grad(), aside(self.kept):
            packed = self._pack(self.kept)
        if packed is not None:
            self._forget()
            self.kept, self.is_packed = packed, True
        return True

    def _forget(self) -> None:
        if self.kept is not None and not self.is_packed:
            self.kept = None
            _num_aliases[self.storage_key] -= 1
            if not _num_aliases[self.storage_key]:
                del _num_aliases[self.storage_key]

    def take(self) -> Tensor:
        """What backward reads: the tensor itself, or what stands for it. Let go of it if this backward is the last."""
        was_packed = self.is_packed
        kept = self.take_as_kept()
        return self._unpack(kept) if was_packed else kept

    def take_as_kept(self) -> Tensor:
        """As `take`, but what it was packed to as that is."""
        kept = self.kept
        assert kept is not None, "torch raises at the second backward, before this"
        if not self.is_packed and kept._version != self._version:
            raise modified(kept, self._version, self._name)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            self.clear()
        return kept

    def clear(self) -> None:
        self._forget()
        self.kept = None

    def __del__(self) -> None:
        self._forget()


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
    """Pack those that could not be when their tensor died, and now can."""
    for _ in range(len(_waiting)):
        try:
            reference = _waiting.popleft()
        except IndexError:  # the collector ran meanwhile, and looked
            return
        holder = reference()
        if holder is not None and not holder.pack_if_alone():
            _waiting.append(reference)


def collected(phase: str, _info: Any) -> None:
    """For ``gc.callbacks``: after the last op of ours in a step nothing else would look."""
    if phase == "stop" and _waiting:
        look_again()


def settle() -> None:
    """Pack all that can be packed, wherever it is held."""
    for holder in list(_live):
        holder.pack_if_alone()


def live_holders() -> Iterable[Holder]:
    return list(_live)
