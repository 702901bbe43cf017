"""Where a cost is paid: rows per module, per op or per parameter, which add up to the totals exactly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from frostline.costing.entry import Entry, numbers_in
from frostline.costing.optimizers import OptimizerModel, SparseGradientsRefused, optimizer_model
from frostline.tracing.calls import Side, is_view
from frostline.tracing.graph import Unit

if TYPE_CHECKING:
    from frostline.costing.cost import Cost
    from frostline.tracing.trace import Trace

TOP_LEVEL = "(top level)"
"""Row of what runs in no submodule: the model's own ops, and the loss."""
FORWARD = "(shared) forward, saved tensors"
GRAD_INPUT = "(shared) grad_input path"
RECOMPUTE = "(shared) recompute"
OTHER_WEIGHT = "(shared) grad_weight of tensors that are no parameters"


@dataclass(frozen=True)
class Row:
    """One part of a cost; the rows of a breakdown add up to the cost's own figures.

    Attributes:
        name: a module, an op, a parameter, or a shared path in parentheses.
        num_calls: op calls (units that are costed as a whole count once); 0 where that has no meaning.
        num_trained: elements that train and belong here.
        saved_bytes: storages that this part is the first to hold for backward.
    """

    name: str
    forward_flops: int = 0
    grad_input_flops: int = 0
    grad_weight_flops: int = 0
    recompute_flops: int = 0
    saved_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    moved_bytes: int = 0
    num_trained: int = 0
    num_calls: int = 0

    @property
    def backward_flops(self) -> int:
        return self.grad_input_flops + self.grad_weight_flops + self.recompute_flops

    @property
    def step_flops(self) -> int:
        return self.forward_flops + self.backward_flops

    def __add__(self, other: Row) -> Row:
        return Row(self.name, *(getattr(self, f) + getattr(other, f) for f in AMOUNTS))


AMOUNTS = tuple(field.name for field in fields(Row) if field.name != "name")


def by_module(cost: Cost, depth: int = 2) -> list[Row]:
    """Rows per module down to ``depth`` names, in the order they run first.

    What a checkpoint or a custom Function runs counts for the innermost module that encloses all of it. Gradients and
    optimizer state count for the module that owns the parameter (under its first name, if it has several).
    """
    if depth < 1:
        raise ValueError(f"depth counts names, so it is 1 or more, not {depth}")

    def cut(module: str) -> str:
        return ".".join(module.split(".")[:depth]) or TOP_LEVEL

    parts = [(cut(_module_of(unit)), row) for unit, row in _unit_rows(cost)]
    parts += [(cut(name.rpartition(".")[0]), row) for name, row in _parameter_rows(cost)]
    return _gathered(parts)


def by_op(cost: Cost) -> list[Row]:
    """Rows per op of the forward, its backward beside it, the dearest first.

    Gradients and optimizer state count for the first op that computes with the parameter (a transpose does not).
    """
    first_use: dict[int, str] = {}
    parts = []
    for unit, row in _unit_rows(cost):
        name = unit.call.name
        parts.append((name, row))
        if unit.call.kind == "op" and is_view(unit.call.target):
            continue
        for bits, slot in zip(unit.behind, unit.inputs, strict=True):
            if slot.is_leaf or slot.side is Side.WEIGHT:
                for number in numbers_in(bits):
                    first_use.setdefault(number, name)
    numbering = cost.trace.parameter_numbers
    parts += [(first_use.get(numbering[name], TOP_LEVEL), row) for name, row in _parameter_rows(cost)]
    return sorted(_gathered(parts), key=lambda row: (-row.step_flops, -row.saved_bytes, row.name))


def by_parameter(cost: Cost) -> list[Row]:
    """Rows per parameter that gets a gradient, then what they share: the forward, grad_input and recompute.

    A parameter's own row holds what would go if it alone were frozen and the path through it were still needed. The
    gradient of a tensor made from several parameters (a weight normalised by another) is one row named after them.
    """
    own = dict(_parameter_rows(cost))
    shared = {name: Row(name) for name in (FORWARD, GRAD_INPUT, RECOMPUTE)}
    for unit, row in _unit_rows(cost):
        shared[FORWARD] += Row(
            "", row.forward_flops, saved_bytes=row.saved_bytes, moved_bytes=row.moved_bytes, num_calls=row.num_calls
        )
        shared[GRAD_INPUT] += Row("", grad_input_flops=row.grad_input_flops)
        shared[RECOMPUTE] += Row("", recompute_flops=row.recompute_flops)
        if row.grad_weight_flops:
            for name, flops in _grad_weight_shares(cost, unit, row.grad_weight_flops):
                own[name] = own.get(name, Row(name)) + Row("", grad_weight_flops=flops)
    return [row for row in (*own.values(), *shared.values()) if row.name in (FORWARD, GRAD_INPUT) or _counts(row)]


def _grad_weight_shares(cost: Cost, unit: Unit, total: int) -> Iterator[tuple[str, int]]:
    """Whom one unit's grad_weight FLOPs are for: each parameter's is what goes when it alone is frozen.

    What no single parameter explains, such as the gradient towards a tensor made from two of them, is theirs jointly.
    """
    ledger, forward, backward = cost._flags
    names = list(cost.trace.parameters)
    asked = forward if backward is None else backward

    def without(bits: int) -> int:
        live = [b & forward & (~bits if backward is None else -1) != 0 for b in unit.behind]
        wanted = None if backward is None else [b & backward & ~bits != 0 for b in unit.behind]
        return ledger.unit_entry(unit, live, wanted).grad_weight_flops

    behind = 0
    for bits, slot in zip(unit.behind, unit.inputs, strict=True):
        behind |= bits & asked if slot.side is not Side.DATA or unit.call.kind != "op" else 0
    behind &= (1 << len(names)) - 1
    candidates = list(numbers_in(behind))
    if len(candidates) == 1:
        yield names[candidates[0]], total
        return
    own = {number: total - without(1 << number) for number in candidates}
    rest = total - sum(own.values())
    if rest:
        alone = [number for number in candidates if without(behind & ~(1 << number))]
        joint = [names[number] for number in alone or candidates if rest < 0 or not own[number]]
        if rest < 0:
            own, rest = {}, total
        yield _joint(joint), rest
    for number, flops in own.items():
        if flops:
            yield names[number], flops


def _joint(names: list[str]) -> str:
    if not names:
        return OTHER_WEIGHT
    more = f" + {len(names) - 3} more" if len(names) > 3 else ""
    return " + ".join(names[:3]) + more


def _counts(row: Row) -> bool:
    return any(getattr(row, amount) for amount in AMOUNTS)


def _unit_rows(cost: Cost) -> Iterator[tuple[Unit, Row]]:
    """Every unit with its amounts; a storage counts for the first unit that holds it."""
    ledger, forward, backward = cost._flags
    entries: list[tuple[Unit, Entry]] = list(ledger.rows(forward, backward))  # first all: a probe may correct a size
    by_units = 0
    for _, entry in entries:
        by_units |= entry.held
    loose = ledger.evaluate(forward, backward).held & ~by_units  # kept by autograd for no op: for who made or got it
    seen = 0
    for unit, entry in entries:
        fresh = entry.held & ~seen
        for slot in (*unit.inputs, *unit.outputs) if loose else ():
            fresh |= loose & 1 << slot.storage
        if unit is entries[-1][0]:
            fresh |= loose & ~seen
        seen |= fresh
        loose &= ~seen
        yield (
            unit,
            Row(
                "",
                forward_flops=entry.forward_flops,
                grad_input_flops=entry.grad_input_flops,
                grad_weight_flops=entry.grad_weight_flops,
                recompute_flops=entry.recompute_flops,
                saved_bytes=ledger.bytes_of(fresh),
                moved_bytes=entry.moved_bytes,
                num_calls=1,
            ),
        )


def _parameter_rows(cost: Cost) -> Iterator[tuple[str, Row]]:
    """What each parameter holds itself: its gradient and its optimizer state (0 where that is unknown)."""
    ledger, forward, backward = cost._flags
    trace = cost.trace
    names = list(trace.parameters)
    trained = {trace.parameter_numbers[name] for name in cost.subset.names}
    sums = ledger.evaluate(forward, backward)
    known = cost.optimizer_bytes is not None
    for number, gradient_bytes, optimizer_bytes in held_by_parameter(trace, sums, optimizer_model(cost._optimizer)):
        name = names[number]
        state_bytes = (optimizer_bytes or 0) if known and number in trained else 0
        yield (
            name,
            Row(
                name,
                gradient_bytes=gradient_bytes,
                optimizer_bytes=state_bytes,
                num_trained=cost.subset.num_elements(name),
            ),
        )


def held_by_parameter(trace: Trace, sums: Entry, keeps: OptimizerModel) -> Iterator[tuple[int, int, int | None]]:
    """Of every parameter that gets a gradient: its number, the gradient's bytes, its state's bytes if it trains.

    The last is None for a sparse gradient that the optimizer refuses.
    """
    sparse: dict[int, int] = {}
    for number, nbytes in sums.sparse:
        sparse[number] = sparse.get(number, 0) + nbytes
    for number, parameter in enumerate(trace.parameter_list):
        if not sums.trained >> number & 1:
            continue
        state_bytes: int | None
        try:
            state_bytes = keeps.state_bytes(parameter, sparse=number in sparse)
        except SparseGradientsRefused:
            state_bytes = None
        yield number, sparse.get(number, trace.gradient_bytes[number]), state_bytes


def _gathered(parts: Iterable[tuple[str, Row]]) -> list[Row]:
    sums: dict[str, Row] = {}
    for name, row in parts:
        sums[name] = sums.get(name, Row(name)) + row
    return [row for row in sums.values() if row.num_calls or _counts(row)]


def _module_of(unit: Unit) -> str:
    """The module a unit runs in; for a region that spans several, the innermost one around all of its ops."""
    if unit.call.kind in ("op", "torch") or not unit.ops:
        return unit.module
    paths = [op.module.split(".") for op in unit.ops]
    common = paths[0]
    for path in paths[1:]:
        same = 0
        while same < min(len(common), len(path)) and common[same] == path[same]:
            same += 1
        common = common[:same]
    return ".".join(common)
