"""Peak memory of a step: which storages live at which moment, simulated over the tape.

In the forward a storage lives as long as the step's own code holds it (`frostline.tracing.lifetimes`), or, if autograd
saved it, until its last holder's backward has run. The backward goes through the calls in reverse, as autograd's engine
does: a gradient lives from the call that made it to the call that takes it; where two meet they are added, in place if
nobody else looks; a parameter's becomes its ``.grad``. Source: ``torch/csrc/autograd/engine.cpp``,
``input_buffer.cpp`` and ``functions/accumulate_grad.h``; held to the allocator's own events in ``tests/truth``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from frostline.costing.engine import Ledger, masks
from frostline.costing.entry import bits_of, numbers_in
from frostline.costing.moment import Moment, Standing
from frostline.probing.attribution import RanOp
from frostline.probing.probe import Probe
from frostline.tracing.calls import Call
from frostline.tracing.graph import Unit
from frostline.tracing.lifetimes import Lifetimes

Scratch = Callable[[Call | RanOp], int]
Ask = Callable[[Unit, frozenset[int], frozenset[int] | None], Probe]


@dataclass(slots=True)
class _Script:
    """What the backward of one unit does to memory under one state of its flags."""

    unit: Unit
    index: int
    runs: bool  # False: what is asked for needs nothing of it, and it is never run
    peak: int  # bytes that it makes, at most at a time
    scratch: int  # of them, what a kernel takes for itself at that moment
    gives: tuple[tuple[int, int, int | None, int, int, bool, bool], ...]  # where it lands, then of `Gradient`
    holds: tuple[int, ...]  # storages, if anything does
    inside: tuple[tuple[int, int], ...]  # where what the forward runs depends on the flags: (op, bytes besides)


class _Gradient:
    """A storage that gradients lie in: its bytes, how many wait in it, whether one of them is a view."""

    __slots__ = ("nbytes", "users", "viewed")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.users = 0
        self.viewed = False


class Simulation:
    """One tape, ready to be asked for any subset.

    Args:
        probe: a unit and its flags -> what its call does under them, as `Ledger.probe`.
        scratch: an op of those -> the bytes its kernel takes beyond inputs and outputs, as far as known.
        rounded: the bytes the device's allocator takes for a storage.
    """

    def __init__(
        self, ledger: Ledger, lives: Lifetimes, probe: Ask, scratch: Scratch, rounded: Callable[[int], int]
    ) -> None:
        self.ledger = ledger
        self.lives = lives
        self.probe = probe
        self.scratch = scratch
        self.rounded = rounded
        self.end = ledger.graph.recorder.num_ops  # the moment at which the loss has returned
        self._born = np.array(lives.born, dtype=np.int64)
        self._died = np.array(lives.died, dtype=np.int64)
        self._last_op = {unit.call.index: max((op.order for op in unit.ops), default=0) for unit in ledger.units}
        self._first_use = _first_uses(ledger)
        self._sizes: list[int] = []
        self._size_array = self._held_until = np.zeros(0, dtype=np.int64)
        self._ops = {op.order: op for unit in ledger.units for op in unit.ops}
        self._op_scratch = np.zeros(self.end + 1, dtype=np.int64)
        for order, op in self._ops.items():
            self._op_scratch[order] = scratch(op)
        self._of_groups: dict[int, dict[Any, tuple[_Script, ...]]] = {id(group): {} for group in ledger.groups}

    # -- the forward ---------------------------------------------------------------------------------------------------

    def _refresh(self) -> None:
        """Take over the storages that replays have found since."""
        ledger, known = self.ledger, len(self._born)
        if self._sizes == ledger.storage_bytes:
            return
        self._sizes = list(ledger.storage_bytes)
        self._size_array = np.array([self.rounded(n) for n in self._sizes], dtype=np.int64)
        made = np.array([self._last_op[unit.call.index] for unit in ledger.makers], dtype=np.int64)
        self._held_until = np.concatenate([self._died, made])  # from when on a held one counts besides
        change = np.zeros(self.end + 2, dtype=np.int64)
        sizes = self._size_array[:known]
        np.add.at(change, self._born, sizes)
        np.add.at(change, self._died, -sizes)
        self._code_alone = np.cumsum(change)

    def _forward(self, held: int) -> tuple[Any, Any]:
        """Bytes at each op, and those of them that autograd holds."""
        count = len(self._sizes)
        octets = np.frombuffer(held.to_bytes((count + 7) // 8, "little"), dtype=np.uint8)
        flags = np.unpackbits(octets, bitorder="little", count=count)
        flags[: len(self._born)] &= self._born < self.end  # (what was there before is no part of it)
        numbers = np.flatnonzero(flags)
        extra = np.bincount(self._held_until[numbers], self._size_array[numbers], self.end + 2)
        level = self._code_alone + np.cumsum(extra).astype(np.int64)
        return level[: self.end + 1], numbers

    def _saved_at(self, numbers: Any, moment: int) -> int:
        known = len(self._born)
        born = np.where(numbers < known, self._born[np.minimum(numbers, known - 1)], self._held_until[numbers])
        return int(self._size_array[numbers[born <= moment]].sum())

    # -- the backward --------------------------------------------------------------------------------------------------

    def _script(self, unit: Unit, live: Sequence[bool], wanted: Sequence[bool] | None) -> _Script | None:
        ledger = self.ledger
        mask, needed = masks(live, wanted)
        if not (mask and unit.held) and not unit.call.varies:
            return None
        found = self.probe(unit, mask, needed)
        entry = ledger.unit_entry(unit, live, wanted)
        may_hold = entry.held | bits_of(n for pair in entry.either for n in pair)
        holds = tuple(n for n in numbers_in(may_hold) if n >= len(self._born) or self._born[n] < self.end)
        peak, inside = self._fullest(unit, found.backward)
        landings = ledger.graph.landings
        gives = []
        for gradient in found.gradients:
            edge = unit.inputs[gradient.index].edge
            if edge is None or edge not in landings:
                continue
            owner, number = landings[edge]
            lies = (gradient.given, gradient.storage, self.rounded(gradient.nbytes), gradient.fits, gradient.view)
            gives.append((owner, number, *lies))
        runs = bool(mask) and unit.held and (needed is None or bool(needed))
        own = self._own(unit, found.forward, holds)
        return _Script(unit, unit.call.index, runs, peak, inside, tuple(gives), holds, own)

    def _fullest(self, unit: Unit, ran: Sequence[RanOp]) -> tuple[int, int]:
        """The most that a backward makes at a time, and what of it a kernel takes for itself.

        A call of several nodes lets its outputs' gradients go as soon as the first has run.
        """
        given = [slot for position, slot in enumerate(unit.outputs) if position in unit.receives]
        over = 0 if unit.call.kind == "op" else sum(self.rounded(slot.meta.nbytes) for slot in given)
        top = (0, 0)
        for op in ran:
            scratch = self.scratch(op)
            let_go = 0 if op.node == ran[0].node else over
            top = max(top, (op.alive + scratch - let_go, scratch))
        return top

    def _own(self, unit: Unit, ran: Sequence[RanOp], holds: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
        """What the ops that a call runs under these flags have in memory beyond what the tape shows: (op, bytes)."""
        if not ran:
            return ()
        orders = [op.order for op in unit.ops]
        lives, known, last = self.lives, len(self._born), orders[-1]
        made = {slot.storage for op in unit.ops for slot in op.outputs if lives.born[slot.storage] >= orders[0]}
        found = []
        for position, op in enumerate(ran):
            order = orders[position * len(orders) // len(ran)]
            counted = {n for n in made if lives.born[n] <= order < lives.died[n]}
            counted.update(n for n in holds if (lives.born[n] <= order if n in made else n >= known and order >= last))
            more = op.alive + self.scratch(op) - sum(self.rounded(self.ledger.storage_bytes[n]) for n in counted)
            if more > 0:
                found.append((order, more))
        return tuple(found)

    def _scripts_of(self, forward_flags: int, backward_flags: int | None) -> list[_Script]:
        """What each call's backward does, in the order of the forward."""
        ledger = self.ledger
        live, wanted = ledger.flags(forward_flags, backward_flags)
        found: list[_Script] = []
        for group, key in ledger.states(live, wanted):
            known = self._of_groups[id(group)]
            scripts = known.get(key)
            if scripts is None:
                made = [self._script(unit, *ledger.unit_flags(unit, live, wanted)) for unit in group.units]
                scripts = known[key] = tuple(script for script in made if script is not None)
            found += scripts
        found.sort(key=_index)
        return found

    def _backward(self, scripts: list[_Script], level: int, numbers: Any, standing: Standing) -> Iterator[Any]:
        """Yield ``(script, level, saved, gradients, scratch)`` at each moment that may be the fullest.

        Args:
            numbers: the storages that autograd holds.
        """
        sizes = self._size_array
        saved = int(sizes[numbers].sum())
        holders = dict.fromkeys(numbers.tolist(), 0)
        for script in scripts:
            for storage in script.holds:
                if storage in holders:
                    holders[storage] += 1
        number_of = self.ledger.graph.tape.parameter_of_leaf
        gradients = 0
        waiting: dict[int, dict[int, _Gradient]] = {}
        loss = self.ledger.graph.tape.loss
        if loss is not None and loss.edge in self.ledger.graph.landings:
            owner, number = self.ledger.graph.landings[loss.edge]
            first = _Gradient(self.rounded(loss.meta.nbytes))
            first.users = 1
            level += first.nbytes
            waiting[owner] = {number: first}
        for script in reversed(scripts):
            if not script.runs:
                continue
            yield script, level + script.peak, saved, gradients, script.scratch
            taken = waiting.pop(script.index, {})
            made: dict[int, _Gradient] = {}
            given: list[_Gradient] = []
            for _, _, source, storage, nbytes, _, view in script.gives:
                lies = taken.get(source) if source is not None else made.get(storage)
                if lies is None:
                    lies = made[storage] = _Gradient(nbytes)
                    level += nbytes
                lies.users += 1
                lies.viewed = lies.viewed or view
                given.append(lies)
            for lies in taken.values():
                lies.users -= 1
                if not lies.users:
                    level -= lies.nbytes
            for storage in script.holds:
                if storage not in holders:
                    continue
                holders[storage] -= 1
                if not holders[storage]:
                    size = int(sizes[storage])
                    level -= size
                    saved -= size
            for (owner, number, _, _, _, fits, _), lies in zip(script.gives, given, strict=True):
                place = (owner, number) if owner >= 0 else (-2 - number, 0)
                others = waiting.setdefault(place[0], {})
                other = others.get(place[1])
                if other is None:
                    others[place[1]] = other = lies
                elif other.users == 1 and not other.viewed:  # added to where it lies
                    lies.users -= 1
                    level -= 0 if lies.users else lies.nbytes
                else:
                    total = _Gradient(lies.nbytes)
                    total.users = 1
                    level += total.nbytes
                    yield script, level, saved, gradients, 0
                    for part in (other, lies):
                        part.users -= 1
                        level -= 0 if part.users else part.nbytes
                    others[place[1]] = other = total
                if owner >= 0 or self._first_use.get(number) != script.index:
                    continue
                del waiting[place[0]]
                parameter = number_of.get(number, -1)
                if parameter in standing.kept:
                    other.users -= 1
                    level -= 0 if other.users else other.nbytes
                elif other.users == 1 and fits:  # it becomes the parameter's .grad as it is
                    gradients += other.nbytes
                else:
                    size = self.rounded(standing.gradient_bytes[parameter] if parameter >= 0 else other.nbytes)
                    level += size
                    gradients += size
                    yield script, level, saved, gradients, 0
                    other.users -= 1
                    level -= 0 if other.users else other.nbytes
        yield None, level, saved, gradients, 0

    # -- the step ------------------------------------------------------------------------------------------------------

    def peak(self, held: int, forward_flags: int, backward_flags: int | None, standing: Standing) -> Moment:
        """The fullest moment of a step in the steady state: the optimizer's state exists, gradients were cleared."""
        self._refresh()
        scripts = self._scripts_of(forward_flags, backward_flags)
        self._refresh()
        curve, numbers = self._forward(held)
        full = curve + self._inner(scripts)
        at = int(full.argmax())
        top, best = int(full[at]), None
        last: Any = None
        for last in self._backward(scripts, int(curve[-1]), numbers, standing):
            if last[1] > top:
                top, best = last[1], last
        level, gradients = last[1], last[3]
        if level + standing.optimizer_scratch > top:
            rest = {"saved": last[2], "transients": level - last[2] - gradients}
            return standing.moment(
                "optimizer", "step", "", gradients=gradients, scratch=standing.optimizer_scratch, **rest
            )
        if best is None:
            return self._forward_moment(at, curve, numbers, int(full[at] - curve[at]), standing)
        return self._backward_moment(best, standing)

    def timeline(
        self, held: int, forward_flags: int, backward_flags: int | None, standing: Standing
    ) -> Iterator[Moment]:
        """Every moment of the step, in order."""
        self._refresh()
        scripts = self._scripts_of(forward_flags, backward_flags)
        self._refresh()
        curve, numbers = self._forward(held)
        inner = self._inner(scripts)
        for order in range(self.end):
            yield self._forward_moment(order, curve, numbers, int(inner[order]), standing)
        last: Any = None
        for last in self._backward(scripts, int(curve[-1]), numbers, standing):
            yield self._backward_moment(last, standing)
        _, level, saved, gradients, _ = last
        rest = {"saved": saved, "transients": level - saved - gradients}
        yield standing.moment("optimizer", "step", "", gradients=gradients, scratch=standing.optimizer_scratch, **rest)

    def _inner(self, scripts: list[_Script]) -> Any:
        """Bytes at each op of the forward that calls make for themselves and let go again."""
        inner = self._op_scratch
        own = [more for script in scripts for more in script.inside]
        if own:
            inner = inner.copy()
            for order, nbytes in own:
                inner[order] = max(inner[order], nbytes)
        return inner

    def _forward_moment(self, order: int, curve: Any, numbers: Any, scratch: int, standing: Standing) -> Moment:
        op = self._ops.get(order)
        saved = self._saved_at(numbers, order)
        name, module = ("loss", "") if op is None else (op.name, op.module)
        transients = int(curve[order]) - saved
        return standing.moment(
            "forward", name, module, saved=saved, transients=transients, scratch=scratch, order=order
        )

    def _backward_moment(self, found: Any, standing: Standing) -> Moment:
        script, level, saved, gradients, scratch = found
        name, module = ("end", "") if script is None else (script.unit.call.name, script.unit.module)
        transients = level - saved - gradients - scratch
        order = -1 if script is None else script.index
        return standing.moment(
            "backward", name, module, gradients=gradients, saved=saved, transients=transients, scratch=scratch,
            order=order,
        )  # fmt: skip

    # -- what a peak is at least, for a subset to be planned by -------------------------------------------------------

    def forward_floor(self, order: int) -> tuple[int, list[int]]:
        """What is in memory at an op of the forward: bytes whatever trains, and those of each storage if it is held."""
        self._refresh()
        made_before = np.ones(len(self._sizes), dtype=bool)
        made_before[: len(self._born)] = self._born < self.end
        by_storage = np.where(made_before & (self._held_until <= order), self._size_array, 0)
        return int(self._code_alone[order] + self._op_scratch[order]), [int(n) for n in by_storage]

    def first_use(self, parameter: int) -> int:
        """The first call that uses a parameter, whose backward is the last to add to its gradient; -1: not known."""
        number_of = self.ledger.graph.tape.parameter_of_leaf
        uses = [index for leaf, index in self._first_use.items() if number_of.get(leaf) == parameter]
        return min(uses, default=-1)

    def backward_peak(self, unit: Unit, live: Sequence[bool]) -> int:
        """Bytes that a unit's backward makes at a time while these of its inputs require grad; 0 if it does not run."""
        script = self._script(unit, live, None)
        return script.peak if script is not None and script.runs else 0


def _index(script: _Script) -> int:
    return script.index


def _first_uses(ledger: Ledger) -> dict[int, int]:
    """Per leaf: the first unit that uses it, which is the last whose backward adds to its gradient."""
    found: dict[int, int] = {}
    for unit in ledger.units:
        if unit.held:
            for slot in unit.inputs:
                owner, leaf = ledger.graph.landings.get(slot.edge, (0, 0)) if slot.edge is not None else (0, 0)
                if owner == -1:
                    found.setdefault(leaf, unit.call.index)
    return found
