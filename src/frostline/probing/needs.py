"""What the asked gradients need of what autograd keeps: found by changing it, and looking at the gradients.

A kept tensor is needed if some change of its contents changes a gradient that is asked for. That proves a need; where
no change shows (contents that make a difference only at values never tried), it stays unproved, and is not counted:
what is found so is a lower bound. How many bits an element needs is told by how many different gradients its values
make: the input of an ``abs`` makes two, a GELU's as many as there are values.

Only plain ops of torch's own are asked, on small real tensors. Integers are left as they are, since an index out of its
range may crash a kernel, and so is what frostline's own kernels keep, which pack what they need and nothing else.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from frostline.kernels import eager_kernels
from frostline.probing.attribution import Recording, storage_key
from frostline.probing.probe import Held, Question, go_backward, place_of, roots
from frostline.probing.replay import perform, seed
from frostline.tracing.calls import Slot, tensors_in
from frostline.tracing.environment import is_here, undisturbed
from frostline.tracing.graph import Unit
from frostline.tracing.stand_ins import shrunk_call, stand_in

_SMALL = 8  # sizes up to this stay as they are
_LARGE = 1 << 22  # bytes of tensors up to which a call is asked
_FEW = 4  # different gradients, at most, that are taken for all there are
_NUM_ELEMENTS = 6
_NUM_VALUES = 24


class Need(NamedTuple):
    """How many of the ``width`` bits of each element are needed.

    ``is_proved`` is False where it was not asked, and so counts whole, and where no change showed, which counts as 0.
    """

    bits: int
    width: int
    is_proved: bool

    def of(self, nbytes: int) -> int:
        """The bytes needed of so many."""
        return -(-nbytes * self.bits // self.width)


WHOLE = Need(8, 8, False)


@eager_kernels()
def needs(unit: Unit, question: Question, held: tuple[Held, ...]) -> tuple[Need, ...]:
    """What the gradients asked of ``unit`` need of each storage that it is said to hold."""
    if held and _may_ask(unit, held):
        for smaller in _smaller(unit):
            try:
                with undisturbed():
                    return _Trial(smaller, question).needs(held)
            except Exception:  # sizes that do not fit together, or values that do not
                continue
    return (WHOLE,) * len(held)


def _may_ask(unit: Unit, held: tuple[Held, ...]) -> bool:
    call = unit.call
    own = any(one.index < 0 for one in held)  # what frostline's kernels keep
    private = any(slot.meta.dtype is torch.uint8 for slot in call.outputs)  # bytes that only the kernel understands
    return call.kind == "op" and call.target.namespace == "aten" and call.hooks is None and not own and not private


def _smaller(unit: Unit) -> Iterator[Unit]:
    """The call at the sizes to try. The numbers among its arguments may be sizes too, which kernels do not check."""
    fixed = max((value for value in (*unit.call.args, *unit.call.kwargs.values()) if type(value) is int), default=0)
    for call in (*(shrunk_call(unit.call, keep) for keep in (_SMALL, 8 * _SMALL) if keep >= fixed), unit.call):
        slots = (*call.inputs, *call.outputs)
        if sum(slot.meta.nbytes for slot in slots) <= _LARGE and all(is_here(slot.meta.device) for slot in slots):
            yield replace(unit, call=call, inputs=call.inputs, outputs=call.outputs)


class _Kept(NamedTuple):
    """A storage that autograd may keep in a trial, and those of its elements that the call has of it."""

    place: tuple[str, int]
    elements: Tensor
    positions: Tensor


_Change = Callable[[Tensor], None]  # given the elements of a storage


class _Trial:
    """A call that is run again and again on the same random tensors, with something that is kept changed in between."""

    def __init__(self, unit: Unit, question: Question) -> None:
        self._unit = unit
        self._question = question
        self._kept: list[_Kept] = []
        self._unchanged = self._run()
        if self._run() != self._unchanged:
            raise RuntimeError(f"the gradients of {unit.call.name} differ from run to run")

    def needs(self, held: tuple[Held, ...]) -> tuple[Need, ...]:
        places = [kept.place for kept in self._kept]
        new = [place for place in places if place[0] == "new"]
        mine = sorted(one.index for one in held if one.kind == "new")
        if len(new) != len(mine):
            raise RuntimeError("not what is kept at full size")
        found = []
        for one in held:
            place = new[mine.index(one.index)] if one.kind == "new" else (one.kind, one.index)
            found.append(self._need(places.index(place)))
        return tuple(found)

    def _need(self, number: int) -> Need:
        elements, positions = self._kept[number].elements, self._kept[number].positions
        if elements.dtype is torch.bool:
            return Need(1, 8, True) if self._matters(number, _flip) else Need(0, 8, False)
        if not (elements.is_floating_point() or elements.is_complex()):
            return WHOLE
        width = 8 * elements.itemsize
        if not self._matters(number, _refill):
            return Need(0, width, False)
        most = 1
        for position in positions[torch.randperm(len(positions), device=positions.device)[:_NUM_ELEMENTS]].tolist():
            seen = {self._unchanged}
            for value in (3 * torch.randn(_NUM_VALUES, device="cpu")).tolist():
                seen.add(self._run(number, partial(_set, position, value)))
                if len(seen) > _FEW:
                    return Need(width, width, True)
            most = max(most, len(seen))
        return WHOLE if most == 1 else Need(math.ceil(math.log2(most)), width, True)

    def _matters(self, number: int, change: _Change) -> bool:
        return self._run(number, change) != self._unchanged

    def _run(self, number: int | None = None, change: _Change | None = None) -> bytes:
        """Run forward and backward; what is kept as ``number`` is changed in between. Returns the gradients' digest."""
        torch.manual_seed(0)
        unit, question = self._unit, self._question
        got: dict[int, Tensor] = {}
        recording = Recording()
        by_value: dict[int, Tensor] = {}
        receivers = []
        for index, slot in enumerate(unit.inputs):
            if slot.value not in by_value:
                tensor = _random(slot)
                if index in question.mask:
                    tensor, _, receiver = seed(tensor, partial(got.__setitem__, index))
                    receivers.append(receiver)
                by_value[slot.value] = tensor
        tensors = [by_value[slot.value] for slot in unit.inputs]
        recording.follow(tensors)
        with torch.enable_grad(), recording:
            outputs = list(tensors_in(perform(unit.call, tensors, recording)))
        edges, shapes, _ = roots(unit.call, outputs, question.receives)
        with torch.no_grad():
            gradients = [torch.randn(meta.shape, device=meta.device).to(meta.dtype) for meta in shapes]
            self._kept = _kept(recording, tensors, outputs)
            if number is not None and change is not None:
                change(self._kept[number].elements)
        with recording:
            go_backward(edges, gradients, None)
        return _digest(got)


def _random(slot: Slot) -> Tensor:
    """Like `stand_in`, with values of its own: normal ones; integers as they are known, or zeros."""
    if slot.known is not None and slot.known.shape == slot.meta.shape:
        return slot.known.clone()
    tensor = stand_in(slot.meta, real=True)
    if tensor.numel() and slot.meta.layout is torch.strided:
        _refill(_elements(tensor.untyped_storage(), tensor)[0])
    return tensor


def _refill(elements: Tensor) -> None:
    if elements.dtype is torch.bool:
        elements.bernoulli_()
    elif elements.is_floating_point() or elements.is_complex():
        elements.normal_()


def _flip(elements: Tensor) -> None:
    elements.logical_not_()


def _set(position: int, value: float, elements: Tensor) -> None:
    elements[position] = value


def _elements(storage: torch.UntypedStorage, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """All elements of a storage, under a version counter of their own, and the positions of those in ``tensor``."""
    every = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage)
    numbers = torch.arange(len(every), device=every.device)
    return every, numbers.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).unique()


def _kept(recording: Recording, tensors: list[Tensor], outputs: list[Tensor]) -> list[_Kept]:
    """Every storage that autograd may keep: those of inputs and outputs, and of what is alive all the same."""
    keys = [[storage_key(t) for t in given] for given in (tensors, outputs)]
    found = [
        _Kept((kind, index), *_elements(tensor.untyped_storage(), tensor))
        for kind, given in (("input", tensors), ("output", outputs))
        for index, tensor in enumerate(given)
        if tensor.layout is torch.strided
    ]
    for order, (key, ref) in enumerate(recording.storages.items()):
        if place_of(key, *keys) is None and not ref.expired():
            storage = torch.UntypedStorage._new_with_weak_ptr(ref.cdata)
            every = torch.empty(0, dtype=recording.dtypes[key], device=storage.device).set_(storage)
            found.append(_Kept(("new", order), every, torch.arange(len(every), device=every.device)))
    return found


def _digest(gradients: dict[int, Tensor]) -> bytes:
    """Tells gradients apart bit by bit, but for the many kinds of NaN."""
    found = hashlib.sha256()
    for index in sorted(gradients):
        flat = gradients[index].to_dense().detach().clone().reshape(-1).resolve_conj().resolve_neg()
        flat[flat.isnan()] = math.nan
        found.update(str(index).encode())
        found.update(flat.view(torch.uint8).cpu().numpy().tobytes())
    return found.digest()
