"""Peak memory in a program: at a moment of the step, what is in memory at least, as a sum over choices.

A peak is the most of many moments, and is not a sum. But at any op of the forward what is in memory is one, and at any
call of the backward there is a sum that it cannot be below: what autograd holds for the calls still to come, the
gradients that are done, what the call itself makes. So a program with some moments' rows allows every subset that
meets the peak, and its bound is a bound; the moments are those at which plans turned out to be too full.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from frostline.costing.entry import numbers_in
from frostline.costing.moment import Moment
from frostline.costing.prediction import _standing
from frostline.planning.problem import Outcome, Problem, Table
from frostline.planning.tables import Tabulator
from frostline.tracing.graph import Unit

if TYPE_CHECKING:
    from frostline.costing.cost import Cost

PEAK = "peak_bytes"


class PeakRows:
    """Adds moments to a problem, as figures whose limit is that of the peak.

    Args:
        cost: of any subset of the trace, by the method that is planned for.
    """

    def __init__(self, tabulator: Tabulator, problem: Problem, cost: Cost) -> None:
        self.tabulator = tabulator
        self.simulation = tabulator.engine.simulation
        standing = _standing(cost)
        self.standing = standing.weights + standing.inputs
        self.states = tabulator.optimizer_bytes(problem.choices, unknown=0)
        self.sparse = tabulator.sparse()
        self.figures: list[str] = []

    def first(self, problem: Problem) -> Problem:
        """The problem with the moments that matter for most models: the loss's return, and the optimizer's step."""
        return self.at_optimizer(self.at_forward(problem, self.simulation.end))

    def learn(self, problem: Problem, moment: Moment) -> Problem | None:
        """The problem with a moment that was too full; None if it has it already."""
        if f"{PEAK} at {moment.phase} {moment.order}" in self.figures or moment.order < 0:
            return None
        if moment.phase == "forward":
            return self.at_forward(problem, moment.order)
        return self.at_backward(problem, moment.order) if moment.phase == "backward" else None

    def _named(self, phase: str, order: int) -> str:
        self.figures.append(f"{PEAK} at {phase} {order}")
        return self.figures[-1]

    def at_forward(self, problem: Problem, order: int) -> Problem:
        figure = self._named("forward", order)
        alone, by_storage = self.simulation.forward_floor(order)
        return self._with(problem, figure, alone, self.states, by_storage)

    def at_optimizer(self, problem: Problem) -> Problem:
        figure = self._named("optimizer", 0)
        alone, _ = self.simulation.forward_floor(self.simulation.end)
        gradients = [0 if n in self.sparse else nbytes for n, nbytes in enumerate(self.tabulator.trace.gradient_bytes)]
        owned = [state + gradient for state, gradient in zip(self.states, gradients, strict=True)]
        return self._with(problem, figure, alone, owned, [])

    def at_backward(self, problem: Problem, index: int) -> Problem:
        figure = self._named("backward", index)
        alone, sizes = self.simulation.forward_floor(self.simulation.end)
        gradients = self.tabulator.trace.gradient_bytes
        owned = [
            state + (gradients[n] if n not in self.sparse and self.simulation.first_use(n) > index else 0)
            for n, state in enumerate(self.states)
        ]
        last = self._last_holders()
        by_storage = [size if last.get(number, -1) <= index else 0 for number, size in enumerate(sizes)]
        mixed = {number for number, at in last.items() if at > index and number < len(sizes) and sizes[number]}
        known = max(len(sizes), max((len(row) for row in problem.stored.values()), default=0))
        copies = {number: known + place for place, number in enumerate(sorted(mixed))}
        by_storage += [0] * (known - len(by_storage)) + [sizes[number] for number in copies]
        tables = [*problem.tables, *self._remaining(problem, index, copies, figure)]
        return self._with(replace(problem, tables=tables), figure, alone, owned, by_storage)

    def _with(self, problem: Problem, figure: str, alone: int, owned: list[float], by_storage: list[int]) -> Problem:
        return replace(
            problem,
            constants={**problem.constants, figure: self.standing + alone},
            owned={**problem.owned, figure: owned},
            stored={**problem.stored, figure: by_storage} if any(by_storage) else problem.stored,
        )

    def _last_holders(self) -> dict[int, int]:
        """Per storage: the last call that may hold it."""
        found: dict[int, int] = {}
        for unit, outcome in self._outcomes():
            for number in numbers_in(outcome.held):
                found[number] = max(found.get(number, -1), unit.call.index)
            for number in (n for pair in outcome.either for n in pair):
                found[number] = max(found.get(number, -1), unit.call.index)
        return found

    def _outcomes(self) -> Iterator[tuple[Unit, Outcome]]:
        ledger = self.tabulator.ledger
        for group in ledger.groups:
            for state in group.table:
                live = ledger.flags_of(group, state)
                for unit in group.units:
                    entry = ledger.unit_entry(unit, *ledger.unit_flags(unit, live, None))
                    yield unit, Outcome(held=entry.held, either=entry.either)

    def _remaining(self, problem: Problem, index: int, copies: dict[int, int], figure: str) -> Iterator[Table]:
        """What calls up to ``index`` hold of the storages that later ones may hold too, and what its backward makes."""
        ledger = self.tabulator.ledger
        for group, table in zip(ledger.groups, problem.tables, strict=False):
            units = [unit for unit in group.units if unit.call.index <= index]
            if not units:
                continue
            outcomes = {}
            for state in table.outcomes:
                live = ledger.flags_of(group, self.tabulator.whole_state(group, state))
                held = makes = 0
                for unit in units:
                    flags, _ = ledger.unit_flags(unit, live, None)
                    held |= ledger.unit_entry(unit, flags, None).held
                    if unit.call.index == index:
                        makes = self.simulation.backward_peak(unit, flags)
                bits = 0
                for number in numbers_in(held):
                    bits |= 1 << copies[number] if number in copies else 0
                outcomes[state] = Outcome({figure: makes} if makes else {}, bits)
            if any(outcome.held or outcome.amounts for outcome in outcomes.values()):
                yield Table(table.conditions, outcomes)
