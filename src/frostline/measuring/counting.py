"""One step under observation: the FLOPs of the ops that really run, and what autograd holds when the loss returns."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from frostline.costing.formulas import flops
from frostline.measuring.loop import Loop
from frostline.probing.storages import attributes, leaves, living, storages_of


@dataclass(frozen=True)
class Counts:
    """What one step did.

    Attributes:
        forward_flops, backward_flops: a multiply-add is 2; recomputation by checkpoints is backward.
        saved_bytes: distinct storages that autograd held when the loss returned, outside parameters and buffers.
        uncounted: ops without a formula; not in any total.
        other: storages that the step used and found there: neither parameters, buffers nor inputs, such as targets
            that the loss brings along; by address, in bytes.
    """

    forward_flops: int
    backward_flops: int
    saved_bytes: int
    uncounted: tuple[str, ...]
    other: dict[int, int]


def count(loop: Loop) -> Counts:
    """Run one step (its optimizer too) and count.

    Assumes, for ``saved_bytes``: what the forward allocated and is still there when the loss has returned is held by
    autograd, but for the loss itself and what modules have as attributes; of these and of what was there before, what
    autograd packed (the hooks of ``torch.autograd.graph.saved_tensors_hooks``) and still holds, or is to put a gradient
    on. So an input that only a checkpoint keeps does not count.
    """
    watch = _Watch(loop)
    gc.collect()
    with watch, torch.autograd.graph.saved_tensors_hooks(watch.pack, _unpack):
        loop.step(watch.mark)
    return Counts(
        forward_flops=watch.flops["forward"],
        backward_flops=watch.flops["backward"],
        saved_bytes=watch.saved_bytes,
        uncounted=tuple(sorted(watch.uncounted)),
        other=watch.other(),
    )


class _Held:
    """What autograd keeps in place of a saved tensor; it lives as long as autograd holds it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # an output that keeps itself through its own graph would never be let go


def _unpack(held: _Held) -> Tensor:
    return held.tensor


class _Watch(TorchDispatchMode):
    """Sees every op of a step, forward and backward, and each tensor that autograd saves."""

    def __init__(self, loop: Loop) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.loop = loop
        self.phase = "forward"
        self.flops = {"forward": 0, "backward": 0, "optimizer": 0}
        self.uncounted: set[str] = set()
        self.saved_bytes = 0
        self._made: dict[int, StorageWeakRef] = {}  # a weak reference keeps the address from being taken again
        self._found: dict[int, StorageWeakRef] = {}
        self._held: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(self, tensor: Tensor) -> _Held:
        held = _Held(tensor)
        if self.phase == "forward":
            self._held.add(held)
        return held

    def mark(self, phase: str, loss: Tensor) -> None:
        if phase == "forward":
            self.phase = "backward"
            self.saved_bytes = self._saved_bytes(loss)
        elif phase == "backward":
            self.phase = "optimizer"

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.phase == "optimizer":
            return op(*args, **kwargs)
        for storage in storages_of((args, kwargs)):
            if storage._cdata not in self._made and storage._cdata not in self._found:
                self._found[storage._cdata] = StorageWeakRef(storage)
        out = op(*args, **kwargs)
        each = flops(op, args, kwargs, _flat(out))
        if each is None:
            self.uncounted.add(str(op))
        else:
            self.flops[self.phase] += sum(each)
        for storage in storages_of(out):
            if storage._cdata not in self._found and storage._cdata not in self._made:
                self._made[storage._cdata] = StorageWeakRef(storage)
        return out

    def _saved_bytes(self, loss: Tensor) -> int:
        gc.collect()
        registered = {s._cdata for s in storages_of([*self.loop.model.parameters(), *self.loop.model.buffers()])}
        seen = {**self._found, **self._made}  # not in it: the number of x * 2.0, which autograd keeps as a tensor
        kept = [h.tensor for h in self._held] + list(leaves(loss))
        held = {s._cdata for s in storages_of(kept)} & set(seen)
        left = {s._cdata for s in storages_of([loss, *(attributes(m) for m in self.loop.model.modules())])}
        made = {key for key, _ in living(self._made)} - left
        return sum(s.nbytes() for key, s in living(seen) if key in (held | made) - registered)

    def other(self) -> dict[int, int]:
        """Storages that were there before and still are, by the address of their memory."""
        loop = self.loop
        known = [*loop.model.parameters(), *loop.model.buffers(), loop.args, loop.kwargs]
        known += [p.grad for p in loop.model.parameters() if p.grad is not None]
        keys = {s._cdata for s in storages_of(known)}
        found = [storage for key, storage in living(self._found) if key not in keys]
        return {s.data_ptr(): s.nbytes() for s in found if s.nbytes() and s.data_ptr()}


def _flat(out: Any) -> tuple[Tensor | None, ...]:
    """An op's outputs, tensor lists laid out flat, an undefined one as None."""
    if isinstance(out, (tuple, list)):
        return tuple(each for item in out for each in _flat(item))
    return (out,) if isinstance(out, Tensor) else (None,)
