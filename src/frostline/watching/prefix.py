"""What a step computes anew for each sample though it comes out the same: the part that could be kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from frostline.costing.engine import Ledger
from frostline.costing.entry import bits_of, op_cost
from frostline.subsets.names import within
from frostline.tracing.calls import Call, Hole, Slot
from frostline.watching.steps import TracedPass


@dataclass(frozen=True)
class Prefix:
    """The part of a step that depends on nothing that changes: no trained weight, no random number, no other sample.

    Attributes:
        flops, seconds: of its forward; 0 seconds where they are not known.
        nbytes: of what the rest takes of it, as far as FLOPs are behind that; the rest is computed again for nothing.
        modules: those in which it does FLOPs, by name in the trace. ``others``: those in which the rest does anything.
    """

    flops: int
    seconds: float
    nbytes: int
    modules: tuple[str, ...]
    others: tuple[str, ...]


def prefix_of(traced: TracedPass, moved: set[int], changing: Iterable[str]) -> Prefix | None:
    """The `Prefix` of a pass; None where its calls cannot be told apart.

    Args:
        moved: ids of the parameters whose values change from step to step.
        changing: modules of the trace whose inputs are others each time, or whose buffers move.
    """
    cost = traced.cost()
    ledger = None if cost is None else cost._flags[0]
    if cost is None or not isinstance(ledger, Ledger):
        return None
    flow = _Flow(traced, ledger, moved, tuple(changing))
    flops = 0
    units = []
    modules: dict[str, None] = {}
    others: dict[str, None] = {}
    for unit, entry in ledger.rows(*cost._flags[1:]):
        same = [flow.see(op, unit.module, requires_grad=flow.is_trained(unit.behind)) for op in unit.ops]
        if not all(same):
            others[unit.module] = None
            continue
        units.append(unit)
        flops += entry.forward_flops
        if entry.forward_flops:
            modules[unit.module] = None
    timed = cost.step_seconds is not None
    seconds = traced.trace._coster.clockwork(ledger).of_forward(units) if timed else 0.0
    return Prefix(flops, seconds, flow.crossing(), tuple(modules), tuple(others))


class _Flow:
    """Follows through the ops, in order, which storages hold what is the same each time, and what crosses over."""

    def __init__(self, traced: TracedPass, ledger: Ledger, moved: set[int], changing: tuple[str, ...]) -> None:
        graph = ledger.graph
        numbers = {id(p): number for number, p in enumerate(traced.trace.parameters.values())}
        self._graph = graph
        self._trained = bits_of(n for n, name in enumerate(traced.trace.parameters) if name in set(traced.now))
        self._moved = bits_of(numbers[each] for each in moved if each in numbers)
        self._changing = changing
        self._changed = {s for unit in ledger.units for op in unit.ops for s in _written(op)} & graph.tape.excluded
        self._dear: set[int] = set()  # storages with FLOPs behind them
        self._taken: dict[int, dict[int, int]] = {}  # of those that cross over: bytes, by tensor

    def is_trained(self, behind: list[int]) -> bool:
        return any(bits & self._trained for bits in behind)

    def see(self, op: Call, module: str, *, requires_grad: bool) -> bool:
        """Whether what an op makes is the same each time."""
        same = not requires_grad and not _is_chancy(op) and not any(within(module, each) for each in self._changing)
        same = same and not any(self._is_changed(slot) for slot in op.inputs)
        results = {slot.storage for slot in op.outputs} | _written(op)
        if same:
            if op_cost(op)[0] or any(slot.storage in self._dear for slot in op.inputs):
                self._dear |= results - self._graph.tape.excluded
            return True
        for slot in op.inputs:
            if slot.storage in self._dear and slot.storage not in self._changed:
                self._taken.setdefault(slot.storage, {})[slot.value] = slot.meta.nbytes
        self._changed |= results
        return False

    def _is_changed(self, slot: Slot) -> bool:
        if slot.storage in self._changed:
            return True
        return slot.is_leaf and bool(self._graph.behind(slot.edge) & self._moved)

    def crossing(self) -> int:
        """Bytes of what is the same each time and the rest takes."""
        sizes = self._graph.recorder.storage_bytes
        return sum(min(sizes[storage], sum(tensors.values())) for storage, tensors in self._taken.items())


def _written(op: Call) -> set[int]:
    """The storages that an op writes to, by its schema."""
    found = set()
    for position, argument in enumerate(op.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = op.args[position] if position < len(op.args) else op.kwargs.get(argument.name)
            found |= {op.inputs[hole.index].storage for hole in _holes(given)}
    return found


def _holes(value: Any) -> Iterator[Hole]:
    if isinstance(value, Hole):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _holes(item)


def _is_chancy(op: Call) -> bool:
    """Whether an op draws random numbers, or mixes the samples of a batch as batch norm does in training."""
    schema = op.target._schema
    given = {
        each.name: op.args[position] if position < len(op.args) else op.kwargs.get(each.name, each.default_value)
        for position, each in enumerate(schema.arguments)
    }
    if "batch_norm" in schema.name:
        return bool(given.get("training", "with_update" in schema.name))
    if torch.Tag.nondeterministic_seeded not in op.target.tags:
        return False
    return not any(given.get(name) == 0 for name in ("p", "dropout_p", "dropout"))
