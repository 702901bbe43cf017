"""A ledger for the subsets of a model whose op calls cannot be asked one by one: each is the step, run as a whole."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from frostline.costing.entry import Entry, bits_of, charge, forward_entry, numbers_in
from frostline.costing.moment import Moment, Standing
from frostline.probing.sizes import true_sizes
from frostline.probing.whole import WholeStep, run_whole
from frostline.tracing.environment import let_go_of
from frostline.tracing.graph import Unit

if TYPE_CHECKING:
    from frostline.tracing.trace import Trace


class Rerun:
    """One set of flags, answered as a `frostline.costing.engine.Ledger` answers any.

    What autograd holds is known for the step, not for each op: `rows` leaves it out, and what `evaluate` says beyond
    them is told from the storages of each unit.
    """

    def __init__(self, trace: Trace, forward_flags: int, backward_flags: int | None) -> None:
        everything = (1 << len(trace.parameter_list)) - 1
        wanted = None if backward_flags is None else frozenset(numbers_in(backward_flags & everything))
        self.step = _run(trace, frozenset(numbers_in(forward_flags & everything)), wanted)
        step = self.step
        self.storage_bytes = list(step.storage_bytes)
        if not step.real:
            for storage, nbytes in true_sizes(step.forward, trace.rehearsal.fake_mode).items():
                self.storage_bytes[storage] = nbytes
        self.units = [_unit(step, index) for index in range(len(step.forward))]
        self._entries = self._charged()
        self.sums = Entry()
        for entry in self._entries:
            self.sums.add(entry)
        self.sums.held = bits_of(step.held)
        self.sums.trained = bits_of(step.trained)
        self.sums.sparse = step.sparse
        self.sums.refusal = step.refusal

    def _charged(self) -> list[Entry]:
        """What each unit costs. A backward op counts for the unit whose autograd node ran it."""
        entries = [forward_entry(unit) for unit in self.units]
        first_nodes = [op.first_node for op in self.step.forward]
        for op in self.step.backward:
            # A node is numbered before the first op that its forward runs.
            place = bisect_left(first_nodes, op.node + 1) if op.node is not None else len(entries)
            place = min(place, len(entries) - 1)
            charge(entries[place], op, self.units[place].module)
        return entries

    def evaluate(self, forward_flags: int, backward_flags: int | None = None) -> Entry:
        """The sums; the flags are those it was made for."""
        return self.sums

    def rows(self, forward_flags: int, backward_flags: int | None) -> Iterator[tuple[Unit, Entry]]:
        """Every unit with what it costs but for what is held, in execution order."""
        yield from zip(self.units, self._entries, strict=True)

    def moments(self, standing: Standing) -> Iterator[Moment]:
        """The memory in use at every moment. Gradients that nobody clears count again while they are made."""
        step, born = self.step, set[int]()
        for unit, alive in zip(self.units, step.alive, strict=False):
            born.update(slot.storage for slot in unit.outputs if slot.storage in step.held)
            saved = min(alive, sum(self.storage_bytes[number] for number in born))
            yield standing.moment("forward", unit.call.name, unit.module, saved=saved, transients=alive - saved)
        held = self.bytes_of(self.sums.held)
        for op in step.backward:
            saved = min(op.alive, held)
            yield standing.moment("backward", str(op.op), "", saved=saved, transients=op.alive - saved)
        made = sum(standing.gradient_bytes[number] for number in step.trained if number not in standing.kept)
        yield standing.moment("optimizer", "step", "", gradients=made, scratch=standing.optimizer_scratch)

    def unit_entry(self, unit: Unit, live: Iterable[bool], wanted: Iterable[bool] | None) -> Entry:
        """What a unit would cost under other flags is not known: nothing of it is any one parameter's own."""
        return Entry()

    def bytes_of(self, storages: int) -> int:
        """The bytes of a set of storages."""
        return sum(self.storage_bytes[number] for number in numbers_in(storages))


def _run(trace: Trace, trainable: frozenset[int], wanted: frozenset[int] | None) -> WholeStep:
    """The step on fake tensors, or, where they do not go all the way back and there are weights, on real ones."""
    rehearsal = trace.rehearsal
    settled = rehearsal.real or any(p.device.type == "meta" for p in trace.parameter_list)
    try:
        step = run_whole(rehearsal, trainable, wanted, lean=trace.lean)
        if settled or not step.sparse:  # (a fake sparse gradient has no rows)
            return step
    except Exception as error:
        if settled:
            raise
        let_go_of(error)
    return run_whole(replace(rehearsal, real=True), trainable, wanted, lean=trace.lean)


def _unit(step: WholeStep, index: int) -> Unit:
    call = step.forward[index]
    call.index = index
    behind = [
        1 << step.parameter_of_leaf[slot.edge[1]]
        if slot.edge is not None and slot.is_leaf and slot.edge[1] in step.parameter_of_leaf
        else 0
        for slot in call.inputs
    ]
    return Unit(call, call.inputs, behind, call.outputs, held=True, ops=[call])
