"""The lower bound: what the asked gradients need at least of what autograd keeps, without recomputation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from frostline.costing.engine import Group, Ledger, masks
from frostline.costing.entry import bits_of
from frostline.costing.rerun import Rerun
from frostline.probing.needs import Need
from frostline.probing.probe import Held, Probe
from frostline.tracing.graph import Unit

if TYPE_CHECKING:
    from frostline.costing.cost import Cost


class LeastLedger(Ledger):
    """Counts of each storage what the calls that hold it need of it, by `frostline.probing.needs`.

    One that some call needs all of counts whole, and else as the call that needs the most of it: two may need the same.

    Args:
        lean: the ledger of what frostline's own kernels keep.
    """

    def __init__(self, lean: Ledger) -> None:
        self.__dict__.update(lean.__dict__)
        self.storage_bytes = list(lean.storage_bytes)
        self.makers = list(lean.makers)
        self.groups = [Group(group.conditions, group.units) for group in lean.groups]
        self._new_storages = dict(lean._new_storages)
        self._unit_entries = {}
        self._byte_tables = []

    def _held_bits(self, unit: Unit, mask: frozenset[int], found: Probe) -> tuple[int, tuple[tuple[int, int], ...]]:
        bits, either = super()._held_bits(unit, mask, found)
        for storage, (nbytes, _) in self.needed(unit, mask, found, bits).items():
            if nbytes < self.storage_bytes[storage]:
                bits &= ~(1 << storage)
                if nbytes:
                    either += ((storage, self._new_storage((unit, mask, storage, "needed"), nbytes, unit)),)
        return bits, either

    def needed(
        self, unit: Unit, mask: frozenset[int], found: Probe, bits: int
    ) -> dict[int, tuple[int, list[tuple[Held, Need]]]]:
        """Of each of the storages ``bits`` that ``unit`` holds: the bytes it needs, and of which of its tensors."""
        needed: dict[int, tuple[int, list[tuple[Held, Need]]]] = {}
        needs = self.store.needs(unit, self.question(unit, mask, None))
        for held, need in zip(found.held, needs, strict=True):
            storage = self._storage_of(held.kind, held.index, unit)
            if storage is None:
                storage = self._new_storages[unit, mask, held.index]
            if bits >> storage & 1:
                before, because = needed.get(storage, (0, []))
                nbytes = min(before + need.of(self._spanned(held, unit, storage)), self.storage_bytes[storage])
                needed[storage] = nbytes, [*because, (held, need)]
        return needed

    def _spanned(self, held: Held, unit: Unit, storage: int) -> int:
        """Bytes of the elements that the call has of a storage: fewer than all where it has a view."""
        if held.kind == "new":
            return self.storage_bytes[storage]
        meta = (unit.inputs if held.kind == "input" else unit.outputs)[held.index].meta
        if not meta.stride:
            return meta.nbytes
        sizes = (size for size, step in zip(meta.shape, meta.stride, strict=True) if step)
        return math.prod(sizes) * meta.dtype.itemsize

    def chosen(self, either: Iterable[tuple[int, int]], held: int) -> int:
        most: dict[int, int] = {}
        for covered, packed in either:
            if not held >> covered & 1:
                most[covered] = max(most.get(covered, packed), packed, key=self.storage_bytes.__getitem__)
        return bits_of(most.values())


@dataclass(frozen=True)
class Kept:
    """One kept tensor: what autograd keeps of it under ``train-only``, and what is needed of that.

    Attributes:
        op, module: the call that needs the most of it.
        role: what it is to that call: ``"input"``, ``"output"``, or ``"workspace"``.
        need: of an element; what was not asked counts whole.
    """

    op: str
    module: str
    role: str
    nbytes: int
    needed_bytes: int
    need: Need


def kept(cost: Cost) -> list[Kept]:
    """What autograd keeps of a ``lower-bound`` cost's step under ``train-only``, but for what is packed already.

    Empty where the step is run as a whole: then what its calls need is not asked, and counts as it is kept.
    """
    ledger, forward, backward = cost._flags
    if isinstance(ledger, Rerun):
        return []
    assert isinstance(ledger, LeastLedger)
    found: dict[int, Kept] = {}
    for unit, mask in _holding(ledger, forward, backward):
        probe = ledger.probe(unit, mask, None)
        bits, _ = Ledger._held_bits(ledger, unit, mask, probe)
        for storage, (nbytes, because) in ledger.needed(unit, mask, probe, bits).items():
            held, need = max(because, key=lambda pair: pair[1].bits)
            if held.index < 0:
                continue
            role = "workspace" if held.kind == "new" else held.kind
            one = Kept(unit.call.name, unit.module, role, ledger.storage_bytes[storage], nbytes, need)
            if storage not in found or found[storage].needed_bytes < nbytes:
                found[storage] = one
    return list(found.values())


def _holding(ledger: Ledger, forward: int, backward: int | None) -> Iterator[tuple[Unit, frozenset[int]]]:
    live, wanted = ledger.flags(forward, backward)
    for unit in ledger.units:
        mask, _ = masks(*ledger.unit_flags(unit, live, wanted))
        if mask and unit.held:
            yield unit, mask
