"""From a trace to the cost of any subset: carry the flags, look up each probe, add.

Units whose gradients flow on to the same parameters always agree about their flags, so they are folded together once
after tracing: a tape of thousands of op calls becomes a few hundred groups, and a subset costs one look-up a group.
Sets of parameters and of storages are the bits of Python integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from frostline.costing.formulas import flops
from frostline.probing.attribution import RanOp
from frostline.probing.probe import Probe, Question, probe_hook
from frostline.probing.replay import Stage
from frostline.probing.sizes import true_sizes
from frostline.probing.store import ProbeStore
from frostline.tracing.calls import Call, Side, TensorMeta, fill, freeze, is_view
from frostline.tracing.graph import Graph, Unit

if TYPE_CHECKING:
    from torch import Tensor

    from frostline.tracing.trace import Trace

State = tuple[bool, ...]


@dataclass(slots=True)
class Entry:
    """What some units cost under one state of their flags. All additive but ``held`` and ``trained``, which unite."""

    forward_flops: int = 0
    grad_input_flops: int = 0
    grad_weight_flops: int = 0
    recompute_flops: int = 0
    moved_bytes: int = 0
    held: int = 0  # storages, a bit each
    trained: int = 0  # parameters that got a gradient, a bit each
    uncounted: frozenset[tuple[str, str]] = frozenset()  # (op, module)
    unconfirmed: frozenset[str] = frozenset()
    refusal: str = ""
    sparse: tuple[tuple[int, int], ...] = ()  # (parameter, bytes) of gradients that are sparse

    def add(self, other: Entry) -> None:
        self.forward_flops += other.forward_flops
        self.grad_input_flops += other.grad_input_flops
        self.grad_weight_flops += other.grad_weight_flops
        self.recompute_flops += other.recompute_flops
        self.moved_bytes += other.moved_bytes
        self.held |= other.held
        self.trained |= other.trained
        self.uncounted |= other.uncounted
        self.unconfirmed |= other.unconfirmed
        self.refusal = self.refusal or other.refusal
        self.sparse += other.sparse


@dataclass(slots=True)
class Group:
    """Units that depend on the same flags."""

    conditions: tuple[int, ...]  # indices of the engine's distinct parameter sets
    units: list[Unit] = field(default_factory=list)
    table: dict[Any, Entry] = field(default_factory=dict)


class Ledger:
    """One graph, folded. `evaluate` adds up a subset's cost by one method."""

    def __init__(self, graph: Graph, store: ProbeStore) -> None:
        self.graph = graph
        self.store = store
        self.always = graph.always
        self.everything = graph.always | (graph.always - 1)
        self.storage_bytes = list(graph.recorder.storage_bytes)
        self._byte_tables: list[list[int]] = []
        self._new_storages: dict[Any, int] = {}
        self._unit_entries: dict[Any, Entry] = {}
        graph.settle_receivers(self._defined)
        graph.release()
        self.units = graph.units
        self.base = Entry()
        self._fold()
        self.hooks = self._hooks()
        if not graph.tape.real:
            ops = (op for unit in self.units for op in unit.ops)
            for storage, nbytes in true_sizes(ops, store.stage.fake_mode).items():
                self._set_bytes(storage, nbytes)

    def _hooks(self) -> list[tuple[int, Entry, Unit]]:
        """What the user's tensor hooks add: the parameters whose gradients pass through, the cost, a unit beside it."""
        found = []
        homes = {unit.module: unit for unit in reversed(self.units)}
        for hook, behind in self.graph.hooks:
            entry = Entry(held=self._bits_of_storages(slot.storage for slot in hook.closed_over))
            ops = probe_hook(self.store.stage, hook)
            counts = [None] if ops is None else [_backward_flops(op) for op in ops]
            if any(count is None for count in counts):
                entry.uncounted = frozenset({("tensor hook", hook.module)})
            entry.grad_input_flops = sum(sum(count) for count in counts if count is not None)
            found.append((behind, entry, homes.get(hook.module, self.units[-1])))
        return found

    def _defined(self, unit: Unit, receives: frozenset[int]) -> frozenset[int]:
        mask = frozenset(i for i, bits in enumerate(unit.behind) if bits)
        return self.store.get(unit, Question(mask, None, receives)).defined

    def _fold(self) -> None:
        index_of: dict[int, int] = {}
        groups: dict[tuple[int, ...], Group] = {}
        for unit in self.units:
            varies = unit.call.varies
            if not varies:
                self.base.add(self._forward(unit))
            if not unit.held and not varies:
                continue
            distinct = sorted({index_of.setdefault(bits, len(index_of)) for bits in unit.behind if bits})
            if not distinct and not varies:
                continue
            groups.setdefault(tuple(distinct), Group(tuple(distinct))).units.append(unit)
        self.conditions = list(index_of)
        self._index_of = index_of
        self.groups = list(groups.values())

    # -- one unit ------------------------------------------------------------------------------------------------------

    def _forward(self, unit: Unit) -> Entry:
        """What the unit's forward costs, whatever trains."""
        entry = Entry()
        for op in unit.ops:
            counted, moved = _op_cost(op)
            if counted is None:
                entry.uncounted |= {(str(op.target), unit.module)}
            else:
                entry.forward_flops += counted
            entry.moved_bytes += moved
        return entry

    def unit_entry(self, unit: Unit, live: Iterable[bool], wanted: Iterable[bool] | None) -> Entry:
        """What a unit costs beyond `_forward`.

        Args:
            live: which inputs require grad while the forward runs.
            wanted: which gradients ``backward(inputs=...)`` asks for; None: ``backward()``.
        """
        mask = frozenset(i for i, flag in enumerate(live) if flag)
        needed = None if wanted is None else frozenset(i for i, flag in enumerate(wanted) if flag)
        key = (unit, mask, needed)
        entry = self._unit_entries.get(key)
        if entry is None:
            entry = self._unit_entries[key] = self._ask(unit, mask, needed)
        return entry

    def _ask(self, unit: Unit, mask: frozenset[int], needed: frozenset[int] | None) -> Entry:
        entry = Entry()
        varies = unit.call.varies
        if not mask and not varies:
            return entry
        found = self.store.get(unit, Question(mask, needed, unit.receives))
        entry.refusal = found.refusal
        if varies:
            for op in found.forward:
                self._add_backward_op(entry, op, unit, forward=True)
        if not unit.held:
            return entry
        entry.held = self._held_bits(unit, mask, found)
        for op in found.backward:
            self._add_backward_op(entry, op, unit)
        for index in found.defined:
            slot = unit.inputs[index]
            if slot.is_leaf:
                entry.trained |= unit.behind[index] & ~self.always
        entry.sparse = tuple(
            (unit.behind[index].bit_length() - 1, nbytes)
            for index, nbytes in found.sparse
            if unit.inputs[index].is_leaf
        )
        if not found.confirmed:
            entry.unconfirmed = frozenset({unit.call.name})
        return entry

    def _held_bits(self, unit: Unit, mask: frozenset[int], found: Probe) -> int:
        excluded = self.graph.tape.excluded
        bits = 0
        for held in found.held:
            if held.kind == "input":
                storage = unit.inputs[held.index].storage
            elif held.kind == "output" and held.index < len(unit.outputs):
                storage = unit.outputs[held.index].storage
                if unit.call.kind == "op":  # confirmed on real tensors: a fake kernel may not know its size
                    self._set_bytes(storage, held.nbytes)
            else:
                key = (unit, mask, held.index)
                storage = self._new_storages.setdefault(key, len(self.storage_bytes))
                if storage == len(self.storage_bytes):
                    self.storage_bytes.append(held.nbytes)
                    self._byte_tables.clear()
            if storage not in excluded:
                bits |= 1 << storage
        return bits

    def _bits_of_storages(self, storages: Iterable[int]) -> int:
        bits = 0
        for storage in storages:
            if storage not in self.graph.tape.excluded:
                bits |= 1 << storage
        return bits

    def _set_bytes(self, storage: int, nbytes: int) -> None:
        if self.storage_bytes[storage] != nbytes:
            self.storage_bytes[storage] = nbytes
            self._byte_tables.clear()

    def _add_backward_op(self, entry: Entry, op: RanOp, unit: Unit, *, forward: bool = False) -> None:
        entry.moved_bytes += _moved(op)
        counts = _backward_flops(op)
        if counts is None:
            entry.uncounted |= {(str(op.op), unit.module)}
            return
        if not any(counts):
            return
        if forward:
            entry.forward_flops += sum(counts)
            return
        if op.recomputed:
            entry.recompute_flops += sum(counts)
            return
        elsewhere = max((side for side in op.sides if side is not None), default=Side.DATA)
        for count, side in zip(counts, op.sides, strict=True):
            if (elsewhere if side is None else side) is Side.DATA:
                entry.grad_input_flops += count
            else:
                entry.grad_weight_flops += count

    # -- a subset ------------------------------------------------------------------------------------------------------

    def evaluate(self, forward_flags: int, backward_flags: int | None = None) -> Entry:
        """Add up everything.

        Args:
            forward_flags: the parameters (bits) that require grad while the forward runs.
            backward_flags: those whose gradients ``backward(inputs=...)`` asks for; None: ``backward()``.
        """
        live, wanted = self.flags(forward_flags, backward_flags)
        forced = [storage for bits, storage in self.graph.forced_leaves if not bits & forward_flags]
        forward = grad_input = grad_weight = recompute = moved = trained = 0
        held = self._bits_of_storages(forced)
        uncounted: frozenset[tuple[str, str]] = self.base.uncounted
        unconfirmed: frozenset[str] = frozenset()
        refusal = ""
        sparse: tuple[tuple[int, int], ...] = ()
        for group in self.groups:
            state = tuple([live[i] for i in group.conditions])
            key = state if wanted is None else (state, tuple([wanted[i] for i in group.conditions]))
            entry = group.table.get(key)
            if entry is None:
                entry = group.table[key] = self._group_entry(group, live, wanted)
            forward += entry.forward_flops
            grad_input += entry.grad_input_flops
            grad_weight += entry.grad_weight_flops
            recompute += entry.recompute_flops
            moved += entry.moved_bytes
            held |= entry.held
            trained |= entry.trained
            if entry.uncounted:
                uncounted |= entry.uncounted
            if entry.unconfirmed:
                unconfirmed |= entry.unconfirmed
            refusal = refusal or entry.refusal
            if entry.sparse:
                sparse += entry.sparse
        for entry, _ in self._hooks_that_run(forward_flags, backward_flags):
            held |= entry.held
            grad_input += entry.grad_input_flops
            uncounted |= entry.uncounted
        base = self.base
        return Entry(
            base.forward_flops + forward, grad_input, grad_weight, recompute, base.moved_bytes + moved, held, trained,
            uncounted, unconfirmed, refusal, sparse,
        )  # fmt: skip

    def flags(self, forward_flags: int, backward_flags: int | None) -> tuple[list[bool], list[bool] | None]:
        """The state of every condition: what requires grad, and (None: all of that) what is asked for."""
        live = [bits & forward_flags != 0 for bits in self.conditions]
        wanted = None if backward_flags is None else [bits & backward_flags != 0 for bits in self.conditions]
        return live, wanted

    def _hooks_that_run(self, forward_flags: int, backward_flags: int | None) -> Iterator[tuple[Entry, Unit]]:
        for bits, entry, unit in self.hooks:
            if bits & forward_flags:
                runs = backward_flags is None or bits & backward_flags
                yield (entry if runs else Entry(held=entry.held)), unit

    def _group_entry(self, group: Group, live: list[bool], wanted: list[bool] | None) -> Entry:
        total = Entry()
        for unit in group.units:
            total.add(self.unit_entry(unit, *self.unit_flags(unit, live, wanted)))
        return total

    def unit_flags(
        self, unit: Unit, live: list[bool], wanted: list[bool] | None
    ) -> tuple[list[bool], list[bool] | None]:
        index_of = self._index_of
        return (
            [bool(bits) and live[index_of[bits]] for bits in unit.behind],
            None if wanted is None else [bool(bits) and wanted[index_of[bits]] for bits in unit.behind],
        )

    def rows(self, forward_flags: int, backward_flags: int | None) -> Iterator[tuple[Unit, Entry]]:
        """Every unit with what it costs, in execution order; the entries add up to `evaluate`'s."""
        live, wanted = self.flags(forward_flags, backward_flags)
        beside: dict[Unit, Entry] = {}
        for hook, unit in self._hooks_that_run(forward_flags, backward_flags):
            beside.setdefault(unit, Entry()).add(hook)
        for unit in self.units:
            entry = Entry()
            if unit in beside:
                entry.add(beside[unit])
            varies = unit.call.varies
            if not varies:
                entry.add(self._forward(unit))
            if varies or unit.held:
                entry.add(self.unit_entry(unit, *self.unit_flags(unit, live, wanted)))
            yield unit, entry

    def bytes_of(self, storages: int) -> int:
        """The bytes of a set of storages: eight at a time, from tables."""
        count = (len(self.storage_bytes) + 7) // 8
        if len(self._byte_tables) != count:
            self._byte_tables = [_sums(self.storage_bytes[i * 8 : i * 8 + 8]) for i in range(count)]
        octets = storages.to_bytes(count, "little")
        return sum([table[octet] for table, octet in zip(self._byte_tables, octets, strict=True) if octet])


def _sums(values: list[int]) -> list[int]:
    """The sum of every subset of up to eight values, indexed by the subset's bits."""
    sums = [0]
    for value in values:
        sums += [known + value for known in sums]
    return sums + [0] * (256 - len(sums))


_op_costs: dict[Any, tuple[int | None, int]] = {}


def _op_cost(op: Call) -> tuple[int | None, int]:
    metas = [slot.meta for slot in op.inputs]
    outputs = tuple(slot.meta for slot in op.outputs)
    try:
        key = (op.target, freeze(op.args), freeze(op.kwargs), tuple(metas), outputs)
        found = _op_costs.get(key)
    except TypeError:
        key, found = None, None
    if found is None:
        spec = op.output_spec
        flat = spec if isinstance(spec, (tuple, list)) else (spec,)
        given = tuple(fill(o, outputs) for o in flat)
        counts = _flops(op.target, fill(op.args, metas), fill(op.kwargs, metas), given)
        total = None if counts is None else sum(counts)
        found = (total, 0 if is_view(op.target) else sum(m.nbytes for m in metas) + sum(m.nbytes for m in outputs))
        if key is not None:
            _op_costs[key] = found
    return found


def _moved(op: RanOp) -> int:
    if is_view(op.op):
        return 0
    return sum(m.nbytes for m in _metas(op.args)) + sum(m.nbytes for m in op.outputs if m is not None)


def _metas(value: Any) -> Iterator[TensorMeta]:
    if isinstance(value, TensorMeta):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _metas(item)


def _backward_flops(op: RanOp) -> tuple[int, ...] | None:
    return _flops(op.op, op.args, op.kwargs, op.outputs)


def _flops(op: Any, args: Any, kwargs: Any, outputs: Any) -> tuple[int, ...] | None:
    """FLOPs per output; None where there is no formula, or where nested tensors hide the shapes."""
    nested = any(meta.layout is torch.jagged for meta in _metas((args, kwargs)))
    return flops(op, args, kwargs, outputs) if not nested else None


class Engine:
    """Ledgers of one trace: the one of its tapes, and those of subsets that had to be traced again."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.ledger = self._ledger(trace.graph)
        self._retraced: dict[int, Ledger] = {}

    def _ledger(self, graph: Graph) -> Ledger:
        number_of = graph.tape.parameter_of_leaf

        def lend(leaves: dict[int, Tensor]) -> AbstractContextManager[None]:
            numbers = {number_of[leaf]: tensor for leaf, tensor in leaves.items() if leaf in number_of}
            return self.trace.rehearsal.lending(numbers)

        return Ledger(graph, ProbeStore(Stage(self.trace.rehearsal.fake_mode, lend)))

    def bits(self, numbers: Iterable[int]) -> int:
        bits = 0
        for number in numbers:
            bits |= 1 << number
        return bits

    def evaluate(self, numbers: frozenset[int], method: str) -> tuple[Ledger, Entry, bool, int, int | None]:
        """The ledger, the sums, whether the subset was traced again, and the two flag sets they are for."""
        ledger = self.ledger
        asked = self.bits(numbers)
        everything = self.bits(self.trace.trainable_numbers) | ledger.always
        forward, backward = (asked | ledger.always if method == "freeze" else everything), None
        if method == "backward-inputs":
            backward = asked
        retraced = method == "freeze" and bool(self.trace.diverges) and forward != everything
        if retraced:
            ledger = self._trace_again(numbers, asked)
        return ledger, ledger.evaluate(forward, backward), retraced, forward, backward

    def _trace_again(self, numbers: frozenset[int], asked: int) -> Ledger:
        if asked not in self._retraced:
            if len(self._retraced) >= 64:
                self._retraced.pop(next(iter(self._retraced)))
            self._retraced[asked] = self._ledger(Graph(self.trace.record(numbers)[0]))
        return self._retraced[asked]
