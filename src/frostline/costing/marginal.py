"""What one parameter more would add, what one less would save, and which few early ones cause most of the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from frostline.costing.breakdown import held_by_parameter
from frostline.costing.cost import Cost
from frostline.costing.optimizers import OptimizerModel, optimizer_model
from frostline.subsets import Subset, resolve

if TYPE_CHECKING:
    from frostline.tracing.trace import Trace

Progress = Callable[[int, int], None]
FEW = 0.05  # "few" parameters: at most this share of what trains
WORTH = 0.02  # of the step: freezing a group that saves less is not worth a sentence


@dataclass(frozen=True)
class Change:
    """What changes in a step when one parameter is added to the subset, or dropped from it. Exact, as costs are.

    Attributes:
        names: the parameters; one, but for groups.
        num_elements: how many numbers they are.
        step_flops, saved_bytes, gradient_bytes, optimizer_bytes: the step with the larger subset minus the step with
            the smaller one. ``optimizer_bytes`` is None where the optimizer refuses the gradients.
    """

    names: tuple[str, ...]
    num_elements: int
    step_flops: int
    saved_bytes: int
    gradient_bytes: int
    optimizer_bytes: int | None

    @property
    def name(self) -> str:
        return ", ".join(self.names)


@dataclass(frozen=True)
class Marginal:
    """See `marginal`. ``adding`` and ``dropping`` are in the order of the model.

    Attributes:
        cost: the subset's own cost.
        adding: for each frozen parameter, what training it as well would add.
        dropping: for each trained parameter, what freezing it as well would save.
        early: the few parameters used first whose freezing saves most; None if no few stand out.
    """

    cost: Cost
    adding: tuple[Change, ...]
    dropping: tuple[Change, ...]
    early: Change | None

    def to_dict(self) -> dict[str, Any]:
        """Every figure, for JSON."""
        from frostline.reports.data import marginal_to_dict

        return marginal_to_dict(self)

    def __str__(self) -> str:
        from frostline.reports.text import marginal_text

        return marginal_text(self)

    def _repr_html_(self) -> str:
        from frostline.reports.html import marginal_html

        return marginal_html(self)


@dataclass(frozen=True)
class _Figures:
    step_flops: int
    saved_bytes: int
    gradient_bytes: int
    optimizer_bytes: int | None


def marginal(
    trace: Trace, train: Any, method: str = "freeze", optimizer: Any = "adamw", progress: Progress | None = None
) -> Marginal:
    """See `frostline.tracing.trace.Trace.marginal`; ``progress(done, total)`` is called after each cost."""
    subset = train if isinstance(train, Subset) and train.shapes else resolve(train, trace.model)
    cost = trace.cost(subset, method=method, optimizer=optimizer)
    scale = _Scale(trace, method, optimizer_model(optimizer))
    parameters = trace.parameter_list
    names = list(trace.parameters)
    trained = frozenset(trace.parameter_numbers[name] for name in subset.names)
    frozen = [n for n in sorted(trace.trainable_numbers) if n not in trained]
    base = scale.weigh(trained)

    def steps() -> Iterator[tuple[bool, int, Change]]:
        for done, number in enumerate([*frozen, *sorted(trained)], start=1):
            adds = number not in trained
            other = scale.weigh(trained | {number} if adds else trained - {number})
            more, less = (other, base) if adds else (base, other)
            yield adds, number, _change((names[number],), parameters[number].numel(), more, less)
            if progress is not None:
                progress(done, len(frozen) + len(trained))

    changes = list(steps())
    return Marginal(
        cost=cost,
        adding=tuple(change for adds, _, change in changes if adds),
        dropping=tuple(change for adds, _, change in sorted(changes, key=lambda c: c[1]) if not adds),
        early=early_parameters(cost),
    )


def _change(names: tuple[str, ...], num_elements: int, more: _Figures, less: _Figures) -> Change:
    unknown = more.optimizer_bytes is None or less.optimizer_bytes is None
    return Change(
        names,
        num_elements,
        more.step_flops - less.step_flops,
        more.saved_bytes - less.saved_bytes,
        more.gradient_bytes - less.gradient_bytes,
        None if unknown else (more.optimizer_bytes or 0) - (less.optimizer_bytes or 0),
    )


class _Scale:
    """Weighs sets of parameters by number, the empty set too."""

    def __init__(self, trace: Trace, method: str, keeps: OptimizerModel) -> None:
        self.trace = trace
        self.method = method
        self.keeps = keeps
        self._known: dict[frozenset[int], _Figures] = {}

    def weigh(self, numbers: frozenset[int]) -> _Figures:
        found = self._known.get(numbers)
        if found is None:
            found = self._known[numbers] = self._ask(numbers)
        return found

    def _ask(self, numbers: frozenset[int]) -> _Figures:
        trace = self.trace
        ledger, sums, _, _ = trace._coster_for(self.method).evaluate(numbers, self.method)
        backward = sums.grad_input_flops + sums.grad_weight_flops + sums.recompute_flops
        gradient_bytes = 0
        optimizer_bytes: int | None = 0
        for number, gradient, state in held_by_parameter(trace, sums, self.keeps):
            gradient_bytes += gradient
            if number in numbers:
                optimizer_bytes = None if optimizer_bytes is None or state is None else optimizer_bytes + state
        return _Figures(sums.forward_flops + backward, ledger.bytes_of(sums.held), gradient_bytes, optimizer_bytes)


def order_of_use(cost: Cost) -> list[str]:
    """The parameters that get a gradient, in the order in which the forward first uses them."""
    ledger, forward, backward = cost._flags
    names = list(cost.trace.parameters)
    waiting = ledger.evaluate(forward, backward).trained
    found: list[str] = []
    for unit in ledger.units:
        if not unit.held:
            continue
        for bits in unit.behind:
            fresh = bits & waiting
            while fresh:
                low = fresh & -fresh
                found.append(names[low.bit_length() - 1])
                fresh ^= low
                waiting ^= low
        if not waiting:
            break
    return found


def early_parameters(cost: Cost) -> Change | None:
    """The fewest of the parameters used first, at most `FEW` of what trains, whose freezing saves (nearly) the most.

    None if no such few save more than their share.
    """
    scale = _Scale(cost.trace, cost.method, optimizer_model(cost._optimizer))
    numbering = cost.trace.parameter_numbers
    trained = frozenset(numbering[name] for name in cost.subset.names)
    base = scale.weigh(trained)
    sizes = {name: cost.subset.num_elements(name) for name in cost.subset.names}
    budget = FEW * sum(sizes.values())
    taken: list[str] = []
    tried: list[tuple[Change, float]] = []
    for name in order_of_use(cost):
        if name not in sizes:
            continue
        taken.append(name)
        elements = sum(sizes[n] for n in taken)
        rest = trained - {numbering[n] for n in taken}
        if elements > budget or not rest:
            break
        change = _change(tuple(taken), elements, base, scale.weigh(rest))
        tried.append((change, change.step_flops / base.step_flops))
    if not tried:
        return None
    most = max(share for _, share in tried)
    total = sum(sizes.values())
    for change, share in tried:
        stands_out = share >= 2 * change.num_elements / total
        if share >= 0.9 * most and share >= WORTH and stands_out:
            return change
    return None
