"""``trace.cost``: the figures of one subset by one method, each with how it is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from frostline.costing.engine import Ledger
from frostline.costing.entry import Entry
from frostline.costing.optimizers import OptimizerModel, SparseGradientsRefused, optimizer_model
from frostline.costing.rerun import Rerun
from frostline.errors import FrostlineError, SubsetError, TraceError
from frostline.subsets import Subset, resolve
from frostline.tracing.calls import is_view

if TYPE_CHECKING:
    from frostline.costing.breakdown import Row
    from frostline.costing.moment import Moment
    from frostline.costing.seconds import StepSeconds
    from frostline.tracing.trace import Trace

RUN_METHODS = ("freeze", "optimizer-only", "backward-inputs", "train-only")
"""The methods that a loop can run; `METHODS` has what the gradients need at least beside them."""
METHODS = (*RUN_METHODS, "lower-bound")
FIGURES = (
    "forward_flops", "grad_input_flops", "grad_weight_flops", "recompute_flops", "backward_flops", "step_flops",
    "saved_bytes", "gradient_bytes", "optimizer_bytes", "parameter_bytes", "moved_bytes",
)  # fmt: skip


@dataclass(frozen=True)
class SliceNeeds:
    """What the trained slices alone would need, beside what eager torch pays for their whole tensors.

    ``grad_weight_flops`` is the slice's share, by elements, of its tensor's.
    """

    elements: int
    gradient_bytes: int
    optimizer_bytes: int
    grad_weight_flops: int


@dataclass(frozen=True)
class Cost:
    """What one training step costs. FLOPs count a multiply-add as 2; bytes are bytes.

    Attributes:
        forward_flops: everything before the loss returns.
        grad_input_flops, grad_weight_flops: backward towards what depends on the step's inputs, and towards what is
            computed from parameters alone.
        recompute_flops: forward work done again by activation checkpointing.
        saved_bytes: storages autograd still holds when the loss returns, outside parameters and buffers.
        gradient_bytes: ``.grad`` of every parameter that gets one.
        optimizer_bytes: the optimizer's state for the subset, after its first step; None if it refuses the gradients.
        parameter_bytes: the model's parameters, trained or not.
        moved_bytes: bytes read and written by every op that is not a view; `predicted` (caches are not modelled).
        basis: figure -> ``"exact"``, ``"predicted"`` or ``"assumed"``, the last with what was assumed.
        uncounted: op -> modules it runs in, for ops without a FLOP formula; not in any total.
    """

    subset: Subset
    method: str
    optimizer: str
    forward_flops: int
    grad_input_flops: int
    grad_weight_flops: int
    recompute_flops: int
    saved_bytes: int
    gradient_bytes: int
    optimizer_bytes: int | None
    parameter_bytes: int
    moved_bytes: int
    basis: Mapping[str, str]
    uncounted: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = ()
    unreached: tuple[str, ...] = ()
    trace: Trace = field(repr=False, compare=False, default=None)  # type: ignore[assignment]
    _flags: tuple[Ledger | Rerun, int, int | None] = field(repr=False, compare=False, default=None)  # type: ignore[assignment]
    _sums: Entry = field(repr=False, compare=False, default=None)  # type: ignore[assignment]

    @property
    def peak(self) -> Moment:
        """The fullest moment of the step, by kind of memory; `predicted`, in the steady state (from step 2 on)."""
        from frostline.costing.prediction import peak

        return peak(self)

    @property
    def peak_bytes(self) -> int:
        """The most memory in use at a time, weights and optimizer state included."""
        return self.peak.nbytes

    @property
    def peak_by_kind(self) -> dict[str, int]:
        """What `peak_bytes` is made of: weights, inputs, gradients, optimizer_state, saved_activations, transients and
        scratch.
        """
        return dict(self.peak.by_kind)

    def memory_timeline(self) -> list[Moment]:
        """The memory in use at every moment of the step, in order."""
        from frostline.costing.prediction import timeline

        return list(timeline(self))

    @property
    def step_seconds(self) -> float | None:
        """Seconds that one step takes; None until the trace is calibrated (`frostline.Trace.calibrate`)."""
        found = self.seconds
        return None if found is None else found.total

    @property
    def seconds(self) -> StepSeconds | None:
        """`step_seconds` by part (forward, grad_input, grad_weight, ... overhead), with an interval."""
        from frostline.costing.prediction import seconds

        return seconds(self)

    @property
    def backward_flops(self) -> int:
        return self.grad_input_flops + self.grad_weight_flops + self.recompute_flops

    @property
    def step_flops(self) -> int:
        return self.forward_flops + self.backward_flops

    @property
    def num_trained(self) -> int:
        """Elements that train."""
        return self.subset.num_parameters()

    @property
    def num_parameters(self) -> int:
        """Elements of the whole model."""
        return sum(p.numel() for p in self.trace.parameters.values())

    @property
    def num_sliced_tensor_elements(self) -> int:
        """Elements of the tensors that train in part: what eager torch computes gradients for."""
        return sum(self.trace.parameters[name].numel() for name in self.subset.slices)

    @cached_property
    def full(self) -> Cost:
        """The same step with everything trained: what shares are shares of."""
        return self.trace.cost("@all", method="freeze", optimizer=self._optimizer)

    @property
    def _optimizer(self) -> Any:
        return self.__dict__.get("_asked_optimizer", self.optimizer)

    @cached_property
    def slice_needs(self) -> SliceNeeds | None:
        """What the slices of the subset need by themselves; None if only whole tensors train."""
        return _slice_needs(self) if self.subset.slices else None

    def by_module(self, depth: int = 2) -> list[Row]:
        """Rows per module down to ``depth`` names; they add up to the totals."""
        from frostline.costing.breakdown import by_module

        return by_module(self, depth)

    def by_op(self) -> list[Row]:
        """Rows per op of the forward (its backward beside it)."""
        from frostline.costing.breakdown import by_op

        return by_op(self)

    def by_parameter(self) -> list[Row]:
        """Rows per trained parameter, and one for the grad_input path that they share."""
        from frostline.costing.breakdown import by_parameter

        return by_parameter(self)

    def to_dict(self) -> dict[str, Any]:
        """Every figure, for JSON."""
        from frostline.reports.data import cost_to_dict

        return cost_to_dict(self)

    def __str__(self) -> str:
        from frostline.reports.text import cost_line

        return cost_line(self)

    def _repr_html_(self) -> str:
        from frostline.reports.html import cost_html

        return cost_html(self)


def check_method(method: str, *, runs: bool = False) -> None:
    """Raise if there is no such method, or (``runs``) none that a loop can run."""
    if runs and method == "lower-bound":
        raise FrostlineError(
            f"nothing runs 'lower-bound': it is what the gradients need at least, which trace.cost and frostline cost "
            f"say. Methods that run: {', '.join(RUN_METHODS)}"
        )
    if method not in METHODS:
        raise FrostlineError(f"no method {method!r}; there is {', '.join(RUN_METHODS if runs else METHODS)}")


def cost(trace: Trace, train: Any, method: str, optimizer: Any) -> Cost:
    """See `frostline.tracing.trace.Trace.cost`."""
    check_method(method)
    subset = train if isinstance(train, Subset) and train.shapes else resolve(train, trace.model)
    keeps = optimizer_model(optimizer)
    numbering = trace.parameter_numbers
    later = [name for name in subset.names if name not in numbering]
    if later:
        raise SubsetError(f"{later[0]!r} was not in the model when it was traced: trace it again")
    numbers = frozenset([numbering[name] for name in subset.names])
    engine = trace._coster_for(method)
    ledger, sums, forward, backward = engine.evaluate(numbers, method)
    if sums.refusal:
        raise FrostlineError(f"torch refuses method {method!r} for this model: {sums.refusal}")
    trained = [n for n in sorted(numbers) if sums.trained >> n & 1]
    if not trained:
        raise TraceError(_cut(trace, subset))
    return _assemble(trace, subset, method, keeps, optimizer, ledger, sums, trained, (forward, backward))


def _assemble(
    trace: Trace, subset: Subset, method: str, keeps: OptimizerModel, optimizer: Any, ledger: Ledger | Rerun,
    sums: Entry, trained: list[int], flags: tuple[int, int | None],
) -> Cost:  # fmt: skip
    parameters = trace.parameter_list
    gets_grad = [n for n in range(len(parameters)) if sums.trained >> n & 1]
    uncounted: dict[str, list[str]] = {}
    for op, module in sorted(sums.uncounted):
        uncounted.setdefault(op, []).append(module)
    for node in trace.graph.unmatched:
        uncounted.setdefault(f"autograd node {node}", []).append("")
    notes = [*trace.notes]
    if trace.entangled:
        notes.append(f"run again as a whole for this subset: {trace.entangled}")
    unreached = tuple([n for n in subset.names if trace.parameter_numbers[n] not in trained])
    sparse = _sparse_gradients(sums)
    dense = trace.gradient_bytes
    optimizer_bytes: int | None = 0
    basis = _basis(trace, sums, method)
    try:
        known = trace.optimizer_tables.setdefault(keeps, {})
        for n in trained:
            if n in sparse or n not in known:
                known[n] = keeps.state_bytes(parameters[n], sparse=n in sparse)
        optimizer_bytes = sum([known[n] for n in trained])
    except SparseGradientsRefused as refusal:
        optimizer_bytes, basis["optimizer_bytes"] = None, f"unknown: {refusal}"
    result = Cost(
        subset=subset,
        method=method,
        optimizer=keeps.name,
        forward_flops=sums.forward_flops,
        grad_input_flops=sums.grad_input_flops,
        grad_weight_flops=sums.grad_weight_flops,
        recompute_flops=sums.recompute_flops,
        saved_bytes=ledger.bytes_of(sums.held),
        gradient_bytes=sum([sparse.get(n, dense[n]) for n in gets_grad]),
        optimizer_bytes=optimizer_bytes,
        parameter_bytes=trace.parameter_bytes,
        moved_bytes=sums.moved_bytes,
        basis=basis,
        uncounted={op: tuple(modules) for op, modules in uncounted.items()},
        notes=tuple(notes),
        unreached=unreached,
        trace=trace,
        _flags=(ledger, *flags),
        _sums=sums,
    )
    result.__dict__["_asked_optimizer"] = optimizer
    return result


def _sparse_gradients(sums: Entry) -> dict[int, int]:
    """Bytes of the sparse gradients, by parameter; uses of one parameter pile up uncoalesced."""
    found: dict[int, int] = {}
    for number, nbytes in sums.sparse:
        found[number] = found.get(number, 0) + nbytes
    return found


def _basis(trace: Trace, sums: Entry, method: str) -> dict[str, str]:
    how = "exact"
    if trace.assumptions:
        how = f"assumed: {'; '.join(trace.assumptions)}"
    basis = dict.fromkeys(FIGURES, how)
    basis["parameter_bytes"] = "exact"
    basis["moved_bytes"] = "predicted"
    basis["peak_bytes"] = basis["step_seconds"] = how if trace.assumptions else "predicted"
    if trace.graph.unmatched:
        seen = ", ".join(sorted(set(trace.graph.unmatched)))
        for figure in ("grad_input_flops", "grad_weight_flops", "backward_flops", "step_flops", "saved_bytes"):
            basis[figure] = f"incomplete: autograd nodes that no recorded op explains ({seen})"
    if sums.unconfirmed and how == "exact":
        basis["saved_bytes"] = f"predicted: the fake kernels' word for {', '.join(sorted(sums.unconfirmed))}"
    if method == "lower-bound" and how == "exact":
        at_small = "assumed: needed, for the lower bound, is what changes a gradient on small random tensors"
        basis["saved_bytes"] = basis["peak_bytes"] = at_small
    return basis


def _slice_needs(cost: Cost) -> SliceNeeds:
    """Every element of a weight takes the same share of its grad_weight. Assumes: so does a slice's."""
    keeps = optimizer_model(cost._optimizer)
    whole = {row.name: row.grad_weight_flops for row in cost.by_parameter()}
    elements = gradient = optimizer = flops = 0
    for name in cost.subset.slices:
        parameter: Tensor = cost.trace.parameters[name]
        part = cost.subset.num_elements(name)
        elements += part
        gradient += part * parameter.element_size()
        optimizer += keeps.state_bytes(parameter.detach().new_empty(part, device="meta"))
        flops += whole.get(name, 0) * part // parameter.numel()
    return SliceNeeds(elements, gradient, optimizer, flops)


def _cut(trace: Trace, subset: Subset) -> str:
    """Which module used the subset last before its path to the loss was cut."""
    numbers = [trace.parameter_numbers[name] for name in subset.names]
    bits = sum(1 << n for n in numbers)
    last = None
    for unit in trace.graph.units:
        if any(b & bits for b in unit.behind) and not (unit.call.kind == "op" and is_view(unit.call.target)):
            last = unit
    names = ", ".join(subset.names[:3]) + (", ..." if len(subset.names) > 3 else "")
    if last is None:
        return f"the loss does not reach {names}: no op of the step uses it where a gradient could flow"
    return (
        f"the loss does not reach {names}: the path ends in module {last.module or '(the model)'!r}, "
        f"after {last.call.name} (detached, under no_grad, or its result is not used)"
    )
