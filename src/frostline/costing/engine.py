"""From a trace to the cost of any subset: carry the flags, look up each probe, add.

Units whose gradients flow on to the same parameters always agree about their flags, so they are folded together once
after tracing: a tape of thousands of op calls becomes a few hundred groups, and a subset costs one look-up a group.
Sets of parameters and of storages are the bits of Python integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from frostline.costing.entry import Entry, backward_flops, bits_of, charge, forward_entry
from frostline.costing.rerun import Rerun
from frostline.errors import FrostlineError
from frostline.probing.probe import Probe, Question, probe_hook
from frostline.probing.replay import Stage
from frostline.probing.sizes import true_sizes
from frostline.probing.store import ProbeStore
from frostline.tracing.environment import let_go_of
from frostline.tracing.graph import Graph, Unit
from frostline.tracing.rehearsal import quiet_fake_kernels

if TYPE_CHECKING:
    from torch import Tensor

    from frostline.costing.calibration import Calibration
    from frostline.costing.memory import Simulation
    from frostline.costing.seconds import Clockwork
    from frostline.tracing.trace import Trace

State = tuple[bool, ...]

FROZEN = ("freeze", "train-only", "lower-bound")
"""The methods by which what does not train requires no grad."""


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
        self.makers: list[Unit] = []  # of the storages beyond the tape's, which only a replay has: the unit
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
            counts = [None] if ops is None else [backward_flops(op) for op in ops]
            if any(count is None for count in counts):
                entry.uncounted = frozenset({("tensor hook", hook.module)})
            entry.grad_input_flops = sum(sum(count) for count in counts if count is not None)
            found.append((behind, entry, homes.get(hook.module, self.units[-1])))
        return found

    def _defined(self, unit: Unit, receives: frozenset[int]) -> frozenset[int]:
        mask = frozenset(i for i, bits in enumerate(unit.behind) if bits)
        return self.store.get(unit, Question(mask, None, receives, unit.reached)).defined

    def _fold(self) -> None:
        index_of: dict[int, int] = {}
        groups: dict[tuple[int, ...], Group] = {}
        for unit in self.units:
            varies = unit.call.varies
            if not varies:
                self.base.add(forward_entry(unit))
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

    def unit_entry(self, unit: Unit, live: Iterable[bool], wanted: Iterable[bool] | None) -> Entry:
        """What a unit costs beyond `forward_entry`.

        Args:
            live: which inputs require grad while the forward runs.
            wanted: which gradients ``backward(inputs=...)`` asks for; None: ``backward()``.
        """
        mask, needed = masks(live, wanted)
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
        found = self.probe(unit, mask, needed)
        entry.refusal = found.refusal
        if varies:
            for op in found.forward:
                charge(entry, op, unit.module, forward=True)
        if not unit.held:
            return entry
        entry.held, entry.either = self._held_bits(unit, mask, found)
        for op in found.backward:
            charge(entry, op, unit.module)
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

    def probe(self, unit: Unit, mask: frozenset[int], needed: frozenset[int] | None) -> Probe:
        """What the unit's call does while ``mask`` requires grad, and ``needed`` is asked for (None: all of it)."""
        return self.store.get(unit, self.question(unit, mask, needed))

    def question(self, unit: Unit, mask: frozenset[int], needed: frozenset[int] | None) -> Question:
        """What `probe` asks."""
        return Question(mask, needed, unit.receives, unit.reached)

    def _held_bits(self, unit: Unit, mask: frozenset[int], found: Probe) -> tuple[int, tuple[tuple[int, int], ...]]:
        """The storages that the unit holds, and those that it holds unless something else does: see `Entry`."""
        excluded = self.graph.tape.excluded
        bits = 0
        either = []
        for held in found.held:
            storage = self._storage_of(held.kind, held.index, unit)
            if storage is None:
                storage = self._new_storage((unit, mask, held.index), held.nbytes, unit)
            elif held.kind == "output" and unit.call.kind == "op":  # confirmed: a fake kernel may not know its size
                self._set_bytes(storage, held.nbytes)
            covered = None if held.covers is None else self._storage_of(*held.covers, unit)
            if covered is not None:
                if covered not in excluded:
                    either.append((covered, storage))
            elif storage not in excluded:
                bits |= 1 << storage
        return bits, tuple(either)

    def _new_storage(self, key: Any, nbytes: int, unit: Unit) -> int:
        """The number of a storage beyond the tape's, which ``key`` tells from others."""
        storage = self._new_storages.setdefault(key, len(self.storage_bytes))
        if storage == len(self.storage_bytes):
            self.storage_bytes.append(nbytes)
            self.makers.append(unit)
            self._byte_tables.clear()
        return storage

    @staticmethod
    def _storage_of(kind: str, index: int, unit: Unit) -> int | None:
        """The tape's storage that a `Held` speaks of; None: one that only a replay has."""
        if kind == "input":
            return unit.inputs[index].storage
        return unit.outputs[index].storage if kind == "output" and index < len(unit.outputs) else None

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
        either: tuple[tuple[int, int], ...] = ()
        for group, key in self.states(live, wanted):
            entry = group.table.get(key)
            if entry is None:
                entry = group.table[key] = self._group_entry(group, live, wanted)
            forward += entry.forward_flops
            grad_input += entry.grad_input_flops
            grad_weight += entry.grad_weight_flops
            recompute += entry.recompute_flops
            moved += entry.moved_bytes
            held |= entry.held
            if entry.either:
                either += entry.either
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
        if either:
            held |= self.chosen(either, held)
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

    def states(self, live: list[bool], wanted: list[bool] | None) -> Iterator[tuple[Group, Any]]:
        """Every group, with what its units' flags are: equal for equal flags."""
        for group in self.groups:
            state = tuple([live[i] for i in group.conditions])
            yield group, state if wanted is None else (state, tuple([wanted[i] for i in group.conditions]))

    def of_state(self, group: Group, state: State) -> Entry:
        """What a group costs under ``freeze`` while these of its conditions hold, whichever subset makes them."""
        entry = group.table.get(state)
        if entry is None:
            entry = group.table[state] = self._group_entry(group, self.flags_of(group, state), None)
        return entry

    def flags_of(self, group: Group, state: State) -> list[bool]:
        """The state of every condition, as far as a group asks for it."""
        live = [False] * len(self.conditions)
        for condition, flag in zip(group.conditions, state, strict=True):
            live[condition] = flag
        return live

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
        held = self.evaluate(forward_flags, backward_flags).held
        beside: dict[Unit, Entry] = {}
        for hook, unit in self._hooks_that_run(forward_flags, backward_flags):
            beside.setdefault(unit, Entry()).add(hook)
        for unit in self.units:
            entry = Entry()
            if unit in beside:
                entry.add(beside[unit])
            varies = unit.call.varies
            if not varies:
                entry.add(forward_entry(unit))
            if varies or unit.held:
                entry.add(self.unit_entry(unit, *self.unit_flags(unit, live, wanted)))
            entry.held |= self.chosen(entry.either, held) & held
            yield unit, entry

    def chosen(self, either: Iterable[tuple[int, int]], held: int) -> int:
        """Of each pair of storages the one that is held: the first if it is among ``held``, or else the second."""
        return bits_of([covered if held >> covered & 1 else packed for covered, packed in either])

    def bytes_of(self, storages: int) -> int:
        """The bytes of a set of storages: eight at a time, from tables."""
        count = (len(self.storage_bytes) + 7) // 8
        if len(self._byte_tables) != count:
            self._byte_tables = [_sums(self.storage_bytes[i * 8 : i * 8 + 8]) for i in range(count)]
        octets = storages.to_bytes(count, "little")
        return sum([table[octet] for table, octet in zip(self._byte_tables, octets, strict=True) if octet])


def masks(live: Iterable[bool], wanted: Iterable[bool] | None) -> tuple[frozenset[int], frozenset[int] | None]:
    """A unit's flags as a `Question` has them: the inputs that require grad, and those asked for (None: all)."""
    mask = frozenset(i for i, flag in enumerate(live) if flag)
    return mask, None if wanted is None else frozenset(i for i, flag in enumerate(wanted) if flag)


def _sums(values: list[int]) -> list[int]:
    """The sum of every subset of up to eight values, indexed by the subset's bits."""
    sums = [0]
    for value in values:
        sums += [known + value for known in sums]
    return sums + [0] * (256 - len(sums))


def _no_scratch(_op: Any) -> int:
    return 0


class Engine:
    """The ledger of one trace; and, where its calls cannot be asked one by one, a run for each set of flags.

    Args:
        of: the engine whose ledger this one counts the least of (see `frostline.costing.bound`).
    """

    def __init__(self, trace: Trace, of: Engine | None = None) -> None:
        self.trace = trace
        self._of = of
        self.calibration: Calibration | None = None
        self._reruns: dict[tuple[int, int | None], Rerun] = {}
        self._clockworks: dict[Ledger | Rerun, Clockwork] = {}

    @cached_property
    def ledger(self) -> Ledger:
        """What the tape's calls answer."""
        if self._of is not None:
            from frostline.costing.bound import LeastLedger

            return LeastLedger(self._of.ledger)
        number_of = self.trace.graph.tape.parameter_of_leaf

        def lend(leaves: dict[int, Tensor]) -> AbstractContextManager[None]:
            numbers = {number_of[leaf]: tensor for leaf, tensor in leaves.items() if leaf in number_of}
            return self.trace.rehearsal.lending(numbers)

        return Ledger(self.trace.graph, ProbeStore(Stage(self.trace.rehearsal.fake_mode, lend)))

    def settle(self, calibration: Calibration) -> None:
        """Take over what a calibration found: the kernels' scratch, and their seconds."""
        self.calibration = calibration
        self.__dict__.pop("simulation", None)
        self._clockworks.clear()

    @cached_property
    def simulation(self) -> Simulation:
        """The tape's memory."""
        from frostline.costing.memory import Simulation
        from frostline.costing.prediction import rounding

        ledger, lives, rounded = self.ledger, self.trace.lifetimes, rounding(self.trace.device)
        if self.calibration is None:
            return Simulation(ledger, lives, ledger.probe, _no_scratch, rounded)
        clockwork = self.clockwork(ledger)
        return Simulation(ledger, lives, clockwork.probe, clockwork.scratch, rounded)

    def clockwork(self, ledger: Ledger | Rerun) -> Clockwork:
        """The seconds of what answers for a subset, by the calibration."""
        from frostline.costing.seconds import Clockwork

        assert self.calibration is not None, "ask a calibrated trace only"
        found = self._clockworks.get(ledger)
        if found is None:
            calibration = self.calibration
            found = self._clockworks[ledger] = Clockwork(ledger, calibration.timings, calibration.overhead)
        return found

    def evaluate(self, numbers: frozenset[int], method: str) -> tuple[Ledger | Rerun, Entry, int, int | None]:
        """What answers for a subset, the sums, and the two flag sets they are for."""
        asked, always = bits_of(numbers), self.trace.graph.always
        everything = bits_of(self.trace.trainable_numbers) | always
        forward, backward = (asked | always if method in FROZEN else everything), None
        if method == "backward-inputs":
            backward = asked
        if not self.trace.entangled:
            try:
                with quiet_fake_kernels():
                    sums = self.ledger.evaluate(forward, backward)
                if not self.trace.graph.entangled:
                    return self.ledger, sums, forward, backward
                self.trace.entangled = self.trace.graph.entangled
            except FrostlineError:
                raise
            except Exception as error:  # a call that does not run by itself, on made-up values
                let_go_of(error)
                self.trace.entangled = f"a call of it does not run by itself ({type(error).__name__}: {error})"
        rerun = self._rerun(forward, backward)
        return rerun, rerun.sums, forward, backward

    def _rerun(self, forward: int, backward: int | None) -> Rerun:
        key = (forward, backward)
        if key not in self._reruns:
            if len(self._reruns) >= 64:
                self._reruns.pop(next(iter(self._reruns)))
            self._reruns[key] = Rerun(self.trace, forward, backward)
        return self._reruns[key]
