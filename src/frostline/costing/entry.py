"""What ops cost, added up: FLOPs by the gradient they are for, bytes moved, and what has no formula."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from frostline.costing.formulas import flops
from frostline.probing.attribution import RanOp
from frostline.tracing.calls import Call, Side, TensorMeta, fill, freeze, is_view
from frostline.tracing.graph import Unit


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
    either: tuple[tuple[int, int], ...] = ()  # storages: the first if something else holds it, or else the second

    def add(self, other: Entry) -> None:
        self.forward_flops += other.forward_flops
        self.grad_input_flops += other.grad_input_flops
        self.grad_weight_flops += other.grad_weight_flops
        self.recompute_flops += other.recompute_flops
        self.moved_bytes += other.moved_bytes
        self.held |= other.held
        self.either += other.either
        self.trained |= other.trained
        self.uncounted |= other.uncounted
        self.unconfirmed |= other.unconfirmed
        self.refusal = self.refusal or other.refusal
        self.sparse += other.sparse


def forward_entry(unit: Unit) -> Entry:
    """What the forward of a unit costs, by its recorded ops."""
    entry = Entry()
    for op in unit.ops:
        counted, moved = op_cost(op)
        if counted is None:
            entry.uncounted |= {(str(op.target), unit.module)}
        else:
            entry.forward_flops += counted
        entry.moved_bytes += moved
    return entry


def charge(entry: Entry, op: RanOp, module: str, *, forward: bool = False) -> None:
    """Add an op that a replay ran: to the forward, to recomputation, or to the gradient it was for."""
    entry.moved_bytes += _moved(op)
    counts = backward_flops(op)
    if counts is None:
        entry.uncounted |= {(str(op.op), module)}
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


def bits_of(numbers: Iterable[int]) -> int:
    """A set of small numbers as the bits of one."""
    bits = 0
    for number in numbers:
        bits |= 1 << number
    return bits


def numbers_in(bits: int) -> Iterator[int]:
    """The numbers whose bits are set, the smallest first."""
    while bits:
        low = bits & -bits
        yield low.bit_length() - 1
        bits ^= low


_op_costs: dict[Any, tuple[int | None, int]] = {}


def op_cost(op: Call) -> tuple[int | None, int]:
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


def backward_flops(op: RanOp) -> tuple[int, ...] | None:
    return _flops(op.op, op.args, op.kwargs, op.outputs)


def _flops(op: Any, args: Any, kwargs: Any, outputs: Any) -> tuple[int, ...] | None:
    """FLOPs per output; None where there is no formula, or where nested tensors hide the shapes."""
    nested = any(meta.layout is torch.jagged for meta in _metas((args, kwargs)))
    return flops(op, args, kwargs, outputs) if not nested else None
