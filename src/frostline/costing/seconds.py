"""Seconds of a step: the ops that run, each as long as it took alone, and what lies between them.

Added up like FLOPs: by call and by the gradient an op is for. What isolated ops do not show is counted besides: the
sums where gradients meet, the additions to ``.grad`` that nobody clears, the optimizer's step, and the overhead of
Python, of dispatch and of autograd's engine (`frostline.costing.overhead`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from frostline.costing.engine import Group, Ledger, State, masks
from frostline.costing.entry import backward_flops, numbers_in
from frostline.costing.optimizers import OptimizerModel
from frostline.costing.overhead import LARGEST_KEPT, Overhead
from frostline.costing.rerun import Rerun
from frostline.probing.attribution import RanOp
from frostline.probing.probe import Probe, Question, timed_probe
from frostline.probing.stopwatch import NEAR_BYTES, Timing, Work
from frostline.probing.timings import NotTimed, Timings, key_of
from frostline.tracing.calls import Call, Side, TensorMeta, fill, is_view
from frostline.tracing.graph import Unit

_ASKED_FOR_ZEROS = 1 << 20  # bytes of a parameter, from which on it matters what its gradient holds
MODEL_ERROR = 0.1  # of a step: nine of ten in benchmarks/results/accuracy.md are off by no more


@dataclass(frozen=True)
class StepSeconds:
    """What a step takes, by part. ``low`` and ``high``: where it lies nine times of ten (`MODEL_ERROR`).

    ``unknown``: op -> why it could not be timed; what it takes is in no figure.
    """

    forward: float
    grad_input: float
    grad_weight: float
    recompute: float
    optimizer: float
    overhead: float
    uncertainty: float
    unknown: dict[str, str]

    @property
    def total(self) -> float:
        return sum((self.forward, self.grad_input, self.grad_weight, self.recompute, self.optimizer, self.overhead))

    @property
    def low(self) -> float:
        return max(0.0, self.total - self.uncertainty)

    @property
    def high(self) -> float:
        return self.total + self.uncertainty

    def by_part(self) -> dict[str, float]:
        """The parts by name; they add up to ``total``."""
        return {name: getattr(self, name) for name in PARTS}


PARTS = ("forward", "grad_input", "grad_weight", "recompute", "optimizer", "overhead")


def work_of(op: Call | RanOp) -> Work:
    """The op call as something to be timed.

    Assumes: weights and what the forward saved come from memory; all else that a step computes is used by the next op
    or two, and lies in the caches if it is small.
    """
    if isinstance(op, RanOp):
        work = Work(op.op, op.args, op.kwargs)
        made = [meta for meta in op.outputs if meta is not None]
        near = set(range(len(work.metas))) - op.saved
    else:
        metas = [slot.meta for slot in op.inputs]
        work = Work(op.target, fill(op.args, metas), fill(op.kwargs, metas), op.grad_enabled)
        made = [slot.meta for slot in op.outputs]
        near = {number for number, slot in enumerate(op.inputs) if slot.side is not Side.WEIGHT}
    known = work.metas
    if sum(known[number].nbytes for number in near) + sum(meta.nbytes for meta in made) > NEAR_BYTES:
        return work
    return replace(work, near=frozenset(near))


class Tally:
    """Seconds that add up, and numbers of op calls; ``host_...``: of handing them to an accelerator.

    ``unknown``: op -> why its seconds are not among them.
    """

    __slots__ = (
        "backward_ops", "forward", "forward_ops", "grad_input", "grad_weight", "host_backward", "host_forward",
        "lean_ops", "passing_ops", "recompute", "spread", "unknown",
    )  # fmt: skip

    def __init__(self) -> None:
        self.forward = self.grad_input = self.grad_weight = self.recompute = self.spread = 0.0
        self.host_forward = self.host_backward = 0.0
        self.forward_ops = self.backward_ops = self.lean_ops = self.passing_ops = 0
        self.unknown: dict[str, str] = {}

    def add(self, other: Tally) -> None:
        self.forward += other.forward
        self.grad_input += other.grad_input
        self.grad_weight += other.grad_weight
        self.recompute += other.recompute
        self.spread += other.spread
        self.host_forward += other.host_forward
        self.host_backward += other.host_backward
        self.forward_ops += other.forward_ops
        self.backward_ops += other.backward_ops
        self.lean_ops += other.lean_ops
        self.passing_ops += other.passing_ops
        self.unknown.update(other.unknown)

    def note(self, op: Any, timing: Timing) -> None:
        """What every op call adds, whatever it is for."""
        self.spread += timing.uncertainty
        if timing.failure:
            self.unknown[str(op)] = timing.failure

    @property
    def backward(self) -> float:
        return self.grad_input + self.grad_weight + self.recompute


class Clockwork:
    """The seconds of one ledger's subsets."""

    def __init__(self, ledger: Ledger | Rerun, timings: Timings, overhead: Overhead) -> None:
        self.ledger = ledger
        self.timings = timings
        self.overhead = overhead
        self.unknown: dict[str, str] = {}
        self._seen: dict[int, tuple[Any, Timing]] = {}
        self._units: dict[Any, Tally] = {}
        self._groups: dict[Any, Tally] = {}
        self._base: Tally | None = None
        self._joins: dict[int, float] | None = None
        self._steps: dict[Any, Timing] = {}
        self._shares: dict[int, float] = {}

    def timing(self, op: Call | RanOp) -> Timing:
        """The timing of an op call; what fails is noted in ``unknown``."""
        known = self._seen.get(id(op))
        if known is None:
            work = work_of(op)
            found = self.timings.get(work)
            if found.failure:
                self.unknown[str(work.op)] = found.failure
            known = self._seen[id(op)] = (op, found)
        return known[1]

    def scratch(self, op: Call | RanOp) -> int:
        """Bytes that the op's kernel takes for itself; 0 where they are not known."""
        with suppress(NotTimed):
            return self.timing(op).scratch_bytes
        return 0

    # -- adding up -----------------------------------------------------------------------------------------------------

    def step(
        self, forward_flags: int, backward_flags: int | None, trained: Mapping[int, torch.Tensor],
        kept: Iterable[torch.Tensor], optimizer: OptimizerModel, held: int = 0,
    ) -> StepSeconds:  # fmt: skip
        """Seconds of one step.

        Args:
            forward_flags, backward_flags: see `frostline.costing.engine.Ledger.evaluate`.
            trained: the parameters the optimizer steps, by number.
            kept: those that get a gradient which nobody clears.
            held: the storages (bits) that autograd keeps.
        """
        total = self.tally(forward_flags, backward_flags)
        joins = self._meeting(forward_flags if backward_flags is None else backward_flags)
        steps = [self.stepping(optimizer, number, parameter) for number, parameter in trained.items()]
        optimizing = sum(step.seconds for step in steps)
        adding = sum(self._addition(_meta(parameter)) for parameter in kept)
        fresh = self._largest(list(trained.values()))
        optimizing += self.overhead.fresh * sum(p.nbytes * optimizer.num_temporaries(p) for p in fresh)
        adding += self.overhead.fresh * sum(p.nbytes for p in fresh)
        forward = total.forward + self.packing(held)
        parts = (forward, total.grad_input + joins, total.grad_weight + adding, total.recompute, optimizing)
        overhead = self._overhead(total, (forward, sum(parts[1:4]), optimizing), steps)
        uncertainty = total.spread + MODEL_ERROR * (sum(parts) + overhead)
        failed = {f"{optimizer.name}.step": step.failure for step in steps if step.failure}
        return StepSeconds(*parts, overhead, uncertainty, {**total.unknown, **failed})

    def _overhead(self, total: Tally, parts: tuple[float, float, float], steps: Iterable[Timing]) -> float:
        """Seconds of a step beyond its ``parts`` (forward, backward, optimizer).

        On the CPU what lies between the ops. An accelerator works off what it is given while the host goes on: it
        waits for the host, or the host for it, and which may change from one part of the step to the next.
        """
        forward, backward = self._between(total)
        if not self._waits:
            return forward + backward + self.overhead.optimizer
        stepping = self.overhead.optimizer + sum(step.host_seconds for step in steps)
        given = (total.host_forward + forward, total.host_backward + backward, stepping)
        return max(sum(given[:part]) + sum(parts[part:]) for part in range(len(parts) + 1)) - sum(parts)

    @property
    def _waits(self) -> bool:
        """Whether the ops run on an accelerator, which may wait for the host."""
        return self.timings.device.type != "cpu"

    def _between(self, tally: Tally) -> tuple[float, float]:
        """Seconds between the ops of the forward, and of the backward."""
        overhead = self.overhead
        forward = overhead.forward * tally.forward_ops + overhead.lean_forward * tally.lean_ops
        forward += overhead.lean_passing * tally.passing_ops
        return forward, overhead.backward * tally.backward_ops + overhead.lean_backward * tally.lean_ops

    def packing(self, held: int) -> float:
        """Seconds of packing what a run of `frostline.train_only` keeps packed."""
        by_storage = self.of_storages()
        known = len(by_storage)
        return sum(by_storage[number] for number in numbers_in(held) if number < known)

    def of_storages(self) -> list[float]:
        """Seconds of making what is kept, by storage: of packing, and nothing for what is there anyway."""
        ledger = self.ledger
        if isinstance(ledger, Rerun) or not self.overhead.packing:
            return []
        known = len(ledger.storage_bytes) - len(ledger.makers)
        made = zip(ledger.makers, ledger.storage_bytes[known:], strict=True)
        return [0.0] * known + [self.overhead.packing * _packed(unit) if nbytes else 0.0 for unit, nbytes in made]

    def _largest(self, trained: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The parameters for which a gradient, or a temporary of the optimizer's, is memory from the system each time.

        Glibc keeps what is let go up to twice the largest block that ever was, 32 MiB at most, and gives back what is
        more. Assumes: so a step's largest blocks are given back, and no others. Beyond 32 MiB timings show it.
        """
        largest = max([self._largest_made, *(p.nbytes for p in trained if p.nbytes <= LARGEST_KEPT)], default=0)
        return [p for p in trained if largest <= p.nbytes <= LARGEST_KEPT]

    @functools.cached_property
    def _largest_made(self) -> int:
        """Bytes of the largest result in the forward that is not larger than what the allocator keeps."""
        ops = (op for unit in self.ledger.units for op in unit.ops if not is_view(op.target))
        return max((s.meta.nbytes for op in ops for s in op.outputs if s.meta.nbytes <= LARGEST_KEPT), default=0)

    def tally(self, forward_flags: int, backward_flags: int | None) -> Tally:
        """The seconds of the step's op calls, and how many they are."""
        total, ledger = Tally(), self.ledger
        if isinstance(ledger, Rerun):
            total.add(self._forward(ledger.step.forward))
            self._backward(total, ledger.step.backward)
            return total
        if self._base is None:
            self._base = Tally()
            for unit in ledger.units:
                if not unit.call.varies:
                    self._base.add(self._forward(unit.ops))
        total.add(self._base)
        live, wanted = ledger.flags(forward_flags, backward_flags)
        for group, key in ledger.states(live, wanted):
            total.add(self._group(group, key, live, wanted))
        return total

    def _group(self, group: Group, key: Any, live: list[bool], wanted: list[bool] | None) -> Tally:
        assert isinstance(self.ledger, Ledger)
        tally = self._groups.get((id(group), key))
        if tally is None:
            tally = self._groups[id(group), key] = Tally()
            for unit in group.units:
                tally.add(self._unit(unit, *self.ledger.unit_flags(unit, live, wanted)))
        return tally

    # -- the parts that a step's total is the sum of, for a subset to be planned by ------------------------------------
    # (On an accelerator those of its own work: the total is no sum there, and never less.)

    def of_forward(self, units: Iterable[Unit]) -> float:
        """Seconds of the forward of some units, with nothing of theirs trained."""
        tally = Tally()
        for unit in units:
            frozen = [False] * len(unit.behind)
            tally.add(self._unit(unit, frozen, None) if unit.call.varies else self._forward(unit.ops))
        return self._total(tally)

    def of_nothing(self) -> float:
        """Seconds of a step of which nothing trains, but for the groups' own."""
        self.tally(0, None)
        assert self._base is not None
        return self._total(self._base) + (0.0 if self._waits else self.overhead.optimizer)

    def of_state(self, group: Group, state: State) -> float:
        """Seconds of a group under ``freeze`` while these of its conditions hold."""
        assert isinstance(self.ledger, Ledger)
        return self._total(self._group(group, state, self.ledger.flags_of(group, state), None))

    def of_meetings(self) -> dict[int, float]:
        """Seconds of adding gradients up where they meet, by the parameters (bits) of which any brings that about."""
        self._meeting(0)
        return dict(self._joins or {})

    def of_parameter(self, number: int, parameter: torch.Tensor, optimizer: OptimizerModel) -> float:
        """Seconds of the optimizer's step for a parameter."""
        return self.stepping(optimizer, number, parameter).seconds

    def of_the_largest(self, parameter: torch.Tensor, optimizer: OptimizerModel) -> float | None:
        """Seconds on top if no larger parameter trains (see `_largest`); None: it never is among the largest."""
        if not self._largest_made <= parameter.nbytes <= LARGEST_KEPT:
            return None
        return self.overhead.fresh * parameter.nbytes * (1 + optimizer.num_temporaries(parameter))

    def _total(self, tally: Tally) -> float:
        return tally.forward + tally.backward + (0.0 if self._waits else sum(self._between(tally)))

    def _unit(self, unit: Unit, live: Sequence[bool], wanted: Sequence[bool] | None) -> Tally:
        assert isinstance(self.ledger, Ledger)
        mask, needed = masks(live, wanted)
        key = (unit, mask, needed)
        tally = self._units.get(key)
        if tally is None:
            tally = self._units[key] = Tally()
            varies = unit.call.varies
            if mask or varies:
                found = self.probe(unit, mask, needed)
                self.prepare(unit, mask, needed)
                if varies:
                    tally.add(self._forward(found.forward))
                if unit.held and mask and (needed is None or needed):
                    self._backward(tally, found.backward)
                tally.lean_ops += found.lean
        return tally

    def prepare(self, unit: Unit, mask: frozenset[int], needed: frozenset[int] | None) -> None:
        """Time by replays what cannot be run op by op: backwards that read what kernels left, and user code."""
        assert isinstance(self.ledger, Ledger)
        found = self.probe(unit, mask, needed)
        works = [work_of(op) for op in (*found.forward, *found.backward)]
        if not (found.reads_workspace or unit.call.kind != "op") or all(map(self.timings.known, works)):
            return
        question = self._question(unit, mask, needed)
        stage = self.ledger.store.stage
        self.timings.take_replays(works, lambda runner: timed_probe(stage, unit, question, runner))

    # -- how gradients lie in memory -----------------------------------------------------------------------------------

    def probe(self, unit: Unit, mask: frozenset[int], needed: frozenset[int] | None) -> Probe:
        """As the ledger's, with incoming gradients that lie as they do in a step: a transposed one takes longer."""
        assert isinstance(self.ledger, Ledger)
        return self.ledger.store.get(unit, self._question(unit, mask, needed))

    def _question(self, unit: Unit, mask: frozenset[int], needed: frozenset[int] | None) -> Question:
        assert isinstance(self.ledger, Ledger)
        return replace(self.ledger.question(unit, mask, needed), strides=self._strides.get(unit, ()))

    @functools.cached_property
    def _strides(self) -> dict[Unit, tuple[tuple[int, tuple[int, ...]], ...]]:
        """See `Question`. Assumes: they are the same whatever trains, and those of a sum are of the first to come."""
        ledger = self.ledger
        assert isinstance(ledger, Ledger)
        landings = ledger.graph.landings
        found: dict[Unit, tuple[tuple[int, tuple[int, ...]], ...]] = {}
        arriving: dict[tuple[int, int], tuple[int, ...]] = {}
        for unit in reversed(ledger.units):
            mask = frozenset(index for index, bits in enumerate(unit.behind) if bits)
            if not unit.held or not mask:
                continue
            odd = tuple(
                (number, stride)
                for number, slot in enumerate(unit.outputs)
                if (stride := arriving.get((unit.call.index, number))) and stride != slot.meta.stride
            )
            if odd:
                found[unit] = odd
            for gradient in ledger.store.gradients(unit, replace(ledger.question(unit, mask, None), strides=odd)):
                edge = unit.inputs[gradient.index].edge
                if edge is not None and edge in landings:
                    arriving.setdefault(landings[edge], gradient.stride)
        return found

    # -- adding up, part by part ---------------------------------------------------------------------------------------

    def _forward(self, ops: Iterable[Call | RanOp]) -> Tally:
        tally = Tally()
        for op in ops:
            timing = self.timing(op)
            tally.forward += timing.seconds
            tally.note(op.target if isinstance(op, Call) else op.op, timing)
            tally.host_forward += timing.host_seconds
            tally.forward_ops += 1
            tally.passing_ops += isinstance(op, Call) and op.replaced
        return tally

    def _backward(self, tally: Tally, ops: Iterable[RanOp]) -> None:
        for op in ops:
            timing = self.timing(op)
            tally.note(op.op, timing)
            tally.host_backward += timing.host_seconds
            tally.backward_ops += 1
            if op.recomputed:
                tally.recompute += timing.seconds
                continue
            data, weights = _shares(op)
            tally.grad_input += timing.seconds * data
            tally.grad_weight += timing.seconds * weights

    def _meeting(self, reached: int) -> float:
        """Seconds of adding gradients up where they meet; a step run as a whole does not say where."""
        if isinstance(self.ledger, Rerun):
            return 0.0
        if self._joins is None:
            self._joins = self._meetings(self.ledger)
        return sum([seconds for bits, seconds in self._joins.items() if bits & reached])

    def _meetings(self, ledger: Ledger) -> dict[int, float]:
        """Seconds of adding gradients up where several come to one place, by the parameters behind it."""
        uses: dict[tuple[int, int], list[TensorMeta]] = {}
        behind: dict[tuple[int, int], int] = {}
        for unit in ledger.units:
            if not unit.held:
                continue
            for slot, bits in zip(unit.inputs, unit.behind, strict=True):
                place = None if slot.edge is None else ledger.graph.landings.get(slot.edge)
                if place is not None and bits:
                    uses.setdefault(place, []).append(slot.meta)
                    behind[place] = bits
        found: dict[int, float] = {}
        for place, metas in uses.items():
            seconds = sum(self._addition(meta) for meta in metas[1:])
            if seconds:
                found[behind[place]] = found.get(behind[place], 0.0) + seconds
        return found

    def stepping(self, optimizer: OptimizerModel, number: int, parameter: torch.Tensor) -> Timing:
        """The optimizer's step for parameter ``number``."""
        zeros = self._zeros(number, parameter)
        key = (optimizer, parameter.shape, parameter.dtype, zeros)
        found = self._steps.get(key)
        if found is None:
            found = self._steps[key] = optimizer.step_timing(parameter, self.timings, zeros=zeros)
            if found.failure:
                self.unknown[f"{optimizer.name}.step"] = found.failure
        return found

    def _zeros(self, number: int, parameter: torch.Tensor) -> float:
        """How much of a parameter's gradient is zeros, as of an embedding the rows that no index of a batch names.

        Some kernels take several times longer over zeros (MKL's square root, on some processors). Assumes: later
        batches name the same rows. Small parameters are not asked.
        """
        if parameter.nbytes < _ASKED_FOR_ZEROS or isinstance(self.ledger, Rerun):
            return 0.0
        found = self._shares.get(number)
        if found is None:
            left = [self._zeros_left(unit, index) for unit, index in self._uses.get(number, ())]
            found = self._shares[number] = min(left, default=0.0)
        return found

    @functools.cached_property
    def _uses(self) -> dict[int, list[tuple[Unit, int]]]:
        """Per parameter: the units that take it, as which input."""
        found: dict[int, list[tuple[Unit, int]]] = {}
        for unit in self.ledger.units:
            for index, (slot, bits) in enumerate(zip(unit.inputs, unit.behind, strict=True)):
                if unit.held and slot.is_leaf and bits:
                    found.setdefault(bits.bit_length() - 1, []).append((unit, index))
        return found

    def _zeros_left(self, unit: Unit, index: int) -> float:
        """The share of zeros in the gradient towards one input that a unit's backward leaves."""
        meta = unit.inputs[index].meta
        for op in reversed(self.probe(unit, frozenset({index}), None).backward):
            if op.recomputed or not any(out is not None and out.numel == meta.numel for out in op.outputs):
                continue
            computes = backward_flops(op)
            return 0.0 if computes and any(computes) else self.timing(op).zeros
        return 0.0

    def _addition(self, meta: TensorMeta) -> float:
        if meta.layout is not torch.strided:
            return 0.0
        return self.timings.get(Work(torch.ops.aten.add_.Tensor, (meta, meta), {})).seconds

    # -- what has to be timed ------------------------------------------------------------------------------------------

    def tasks(self, rows: Iterable[tuple[int, int | None]] | None = None) -> Iterator[tuple[str, Callable[[], object]]]:
        """What to time for some rows, by their flags (None: for any subset): a name that is the same for what is the
        same, and a call that takes the time.
        """
        ledger = self.ledger
        if isinstance(ledger, Rerun):
            yield from map(self.task, ledger.step.forward)
            yield from map(self.task, ledger.step.backward)
            return
        rows = None if rows is None else list(rows)
        for unit in ledger.units:
            if not unit.call.varies:
                yield from map(self.task, unit.ops)
        for unit in ledger.units:
            if not unit.held and not unit.call.varies:
                continue
            for mask, asked in _states(unit) if rows is None else {_state(unit, *flags) for flags in rows}:
                if not mask and not unit.call.varies:
                    continue
                found = self.probe(unit, mask, asked)
                ops: list[Call | RanOp] = [*found.forward, *found.backward]
                if found.reads_workspace or unit.call.kind != "op":
                    name = " ".join(key_of(work_of(op)) for op in ops)
                    yield name, functools.partial(self.prepare, unit, mask, asked)
                for op in ops:
                    yield self.task(op)

    def task(self, op: Call | RanOp) -> tuple[str, Callable[[], object]]:
        """The timing of one op call, as one of `tasks`."""
        return key_of(work_of(op)), functools.partial(self.timing, op)


def _states(unit: Unit) -> set[tuple[frozenset[int], frozenset[int] | None]]:
    """Every state of a unit's flags; of units with many inputs, the most common: all, none but one, all but one."""
    distinct = sorted({bits for bits in unit.behind if bits})
    if len(distinct) <= 3:
        chosen = [{b for i, b in enumerate(distinct) if n >> i & 1} for n in range(1 << len(distinct))]
    else:
        chosen = [set(), set(distinct), *({b} for b in distinct), *(set(distinct) - {b} for b in distinct)]
    return {(frozenset(i for i, bits in enumerate(unit.behind) if bits in on), None) for on in chosen}


def _state(unit: Unit, forward: int, backward: int | None) -> tuple[frozenset[int], frozenset[int] | None]:
    wanted = None if backward is None else [bool(bits & backward) for bits in unit.behind]
    return masks([bool(bits & forward) for bits in unit.behind], wanted)


def _shares(op: RanOp) -> tuple[float, float]:
    """How much of an op's time is for data, and for weights: by FLOPs, or by elements if it has none."""
    sides = [side for side in op.sides if side is not None]
    if not sides or Side.WEIGHT not in sides:
        return 1.0, 0.0
    if all(side is Side.WEIGHT for side in sides):
        return 0.0, 1.0
    counts: Sequence[float] | None = backward_flops(op)
    if counts is None or not any(counts):
        counts = [0 if meta is None else meta.numel for meta in op.outputs]
    weights = sum(c for c, side in zip(counts, op.sides, strict=True) if side is Side.WEIGHT)
    share = weights / (sum(counts) or 1)
    return 1.0 - share, share


def _meta(tensor: torch.Tensor) -> TensorMeta:
    device = "cpu" if tensor.device.type == "meta" else str(tensor.device)
    return TensorMeta(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, device)


def _packed(unit: Unit) -> int:
    """Elements that are packed if a call keeps something that is neither its input nor its output."""
    call = unit.call
    return unit.outputs[0].meta.numel if call.replaced and call.kind in ("op", "torch") and unit.outputs else 0
