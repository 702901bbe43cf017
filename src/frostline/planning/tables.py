"""From a trace to a `Problem`: the engine's groups as tables, each in every state that some choice brings about."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from frostline.costing.engine import Engine, Group, Ledger
from frostline.costing.entry import Entry, bits_of, numbers_in
from frostline.costing.optimizers import SparseGradientsRefused, optimizer_model
from frostline.errors import FrostlineError, PlanError
from frostline.planning.problem import Choice, Outcome, Problem, State, Table, reachable
from frostline.tracing.rehearsal import quiet_fake_kernels

if TYPE_CHECKING:
    from frostline.costing.seconds import Clockwork
    from frostline.tracing.trace import Trace

MOST_STATES = 256
"""States of one call's flags that are asked about; each may be a probe of its own."""


class Entangled(Exception):  # noqa: N818  an answer, not a mistake
    """The calls of this step cannot be asked one by one."""


class Tabulator:
    """Makes the `Problem` of one trace, method and optimizer."""

    def __init__(self, trace: Trace, method: str, optimizer: Any) -> None:
        self.trace = trace
        self.engine: Engine = trace._coster_for(method)
        self.keeps = optimizer_model(optimizer)
        self.always = trace.graph.always

    @property
    def ledger(self) -> Ledger:
        return self.engine.ledger

    def problem(self, choices: Sequence[Choice], values: Sequence[float], figures: Iterable[str]) -> Problem:
        """What ``choices`` cost, in the figures asked for.

        Raises:
            Entangled: its calls cannot be asked one by one.
            PlanError: one call has more states than can be asked about.
        """
        figures = set(figures)
        self._members: dict[int, int] = {}
        if self.engine.trace.entangled:
            raise Entangled(self.engine.trace.entangled)
        try:
            with quiet_fake_kernels():
                tables = list(self._tables(choices, figures))
        except FrostlineError:
            raise
        except Exception as error:  # as in `Engine.evaluate`: a call that does not run by itself
            raise Entangled(f"a call of it does not run by itself ({type(error).__name__}: {error})") from error
        if self.engine.trace.graph.entangled:
            raise Entangled(self.engine.trace.graph.entangled)
        found = Problem(choices, values, tables)
        owned: dict[str, Sequence[float]] = {}
        constants: dict[str, float] = {}
        if "step_flops" in figures:
            constants["step_flops"] = self.ledger.base.forward_flops
        if "trainable_parameters" in figures:
            found.named = {"trainable_parameters": [p.numel() for p in self.trace.parameter_list]}
        if "optimizer_bytes" in figures:
            owned["optimizer_bytes"] = self.optimizer_bytes(choices)
        if "saved_bytes" in figures:
            found.stored = {"saved_bytes": list(self.ledger.storage_bytes)}
        if "step_seconds" in figures:
            self._time(found, owned, constants)
        found.owned, found.constants = owned, constants
        return found

    @staticmethod
    def _open(choices: Sequence[Choice]) -> int:
        bits = 0
        for choice in choices:
            bits |= choice.parameters
        return bits

    # -- tables --------------------------------------------------------------------------------------------------------

    def _tables(self, choices: Sequence[Choice], figures: set[str]) -> Iterator[Table]:
        ledger = self.ledger
        clockwork = self._clockwork if "step_seconds" in figures else None
        for group in ledger.groups:
            conditions = tuple(ledger.conditions[number] for number in group.conditions)
            yield self._table(conditions, choices, self._asked(group, figures, clockwork), _called(group))
        for bits, entry, _ in ledger.hooks:
            yield self._table((bits,), choices, _if_live(_outcome(entry, figures)))
        for bits, storage in ledger.graph.forced_leaves:
            held = ledger._bits_of_storages((storage,))
            yield self._table((bits,), choices, _if_dead(Outcome(held=held)))
        if clockwork is not None:
            for bits, seconds in clockwork.of_meetings().items():
                yield self._table((bits,), choices, _if_live(Outcome({"step_seconds": seconds})))

    def _asked(self, group: Group, figures: set[str], clockwork: Clockwork | None) -> Callable[[State], Outcome]:
        def ask(state: State) -> Outcome:
            outcome = _outcome(self.ledger.of_state(group, state), figures)
            if clockwork is not None:
                outcome.amounts = {**outcome.amounts, "step_seconds": clockwork.of_state(group, state)}
            return outcome

        return ask

    def _table(
        self, conditions: tuple[int, ...], choices: Sequence[Choice], ask: Callable[[State], Outcome], what: str = ""
    ) -> Table:
        """The outcome of every state; leaves that are no parameters need a gradient always, and make no condition."""
        varying = tuple(bits for bits in conditions if not bits & self.always)
        members = [self._choices_of(bits, choices) for bits in varying]
        fixed = bits_of(number for number, choice in enumerate(choices) if choice.fixed)
        states = list(reachable(members, (1 << len(choices)) - 1, fixed, MOST_STATES))
        if len(states) > MOST_STATES:
            raise PlanError(
                f"{what} depends on {len(varying)} sets of parameters at once, in more than {MOST_STATES} ways: "
                "plan whole layers, by='layer', or leave some of its parameters out with never="
            )
        outcomes = {state: ask(self._whole(conditions, state)) for state in states}
        return Table(varying, outcomes)

    def _choices_of(self, parameters: int, choices: Sequence[Choice]) -> int:
        found = self._members.get(parameters)
        if found is None:
            found = self._members[parameters] = bits_of(
                number for number, choice in enumerate(choices) if choice.parameters & parameters
            )
        return found

    def _whole(self, conditions: tuple[int, ...], state: State) -> State:
        flags = iter(state)
        return tuple([bool(bits & self.always) or next(flags) for bits in conditions])

    def whole_state(self, group: Group, state: State) -> State:
        """A state of a group's table as the ledger has it, with what always holds."""
        return self._whole(tuple(self.ledger.conditions[number] for number in group.conditions), state)

    # -- figures -------------------------------------------------------------------------------------------------------

    def sparse(self) -> set[int]:
        """Parameters whose gradients are sparse, as far as the ledger was asked."""
        entries = (entry for group in self.ledger.groups for entry in group.table.values())
        return {number for entry in entries for number, _ in entry.sparse}

    def optimizer_bytes(self, choices: Sequence[Choice], unknown: float = math.inf) -> list[float]:
        """Per parameter; ``unknown`` where the optimizer refuses the gradients, so that what it keeps is not known."""
        sparse, open_ = self.sparse(), self._open(choices)
        found: list[float] = []
        for number, parameter in enumerate(self.trace.parameter_list):
            try:
                known = open_ >> number & 1
                found.append(self.keeps.state_bytes(parameter, sparse=number in sparse) if known else 0)
            except SparseGradientsRefused:
                found.append(unknown)
        return found

    @property
    def _clockwork(self) -> Clockwork:
        return self.engine.clockwork(self.ledger)

    def _time(self, found: Problem, owned: dict[str, Sequence[float]], constants: dict[str, float]) -> None:
        clockwork, open_ = self._clockwork, self._open(found.choices)
        parameters = self.trace.parameter_list
        steps = [0.0] * len(parameters)
        largest = []
        for number in numbers_in(open_):
            steps[number] = clockwork.of_parameter(number, parameters[number], self.keeps)
            more = clockwork.of_the_largest(parameters[number], self.keeps)
            if more:
                largest.append((parameters[number].nbytes, number, more))
        owned["step_seconds"] = steps
        constants["step_seconds"] = clockwork.of_nothing()
        found.largest = {"step_seconds": largest}
        found.stored = {**found.stored, "step_seconds": clockwork.of_storages()}


def _outcome(entry: Entry, figures: set[str]) -> Outcome:
    backward = entry.grad_input_flops + entry.grad_weight_flops + entry.recompute_flops
    amounts: dict[str, float] = {}
    if "step_flops" in figures:
        amounts["step_flops"] = entry.forward_flops + backward
    if "backward_flops" in figures:
        amounts["backward_flops"] = backward
    return Outcome(amounts, entry.held, entry.either, entry.trained, bool(entry.refusal))


def _if_live(outcome: Outcome) -> Callable[[State], Outcome]:
    return lambda state: outcome if state[0] else Outcome()


def _if_dead(outcome: Outcome) -> Callable[[State], Outcome]:
    return lambda state: Outcome() if state[0] else outcome


def _called(group: Group) -> str:
    unit = group.units[0]
    return f"{unit.call.name} in module {unit.module or '(the model)'!r}"


def gets_gradient(problem: Problem) -> int:
    """The parameters that get a gradient in some state."""
    bits = 0
    for table in problem.tables:
        for outcome in table.outcomes.values():
            bits |= outcome.trained
    return bits
