"""What is chosen from and what it takes, without a trace: choices, tables of what calls cost, storages, amounts.

A *choice* is a set of parameters that train together or not at all. A *condition* is a set of parameters, and holds if
any of them trains. A *table* says what some calls cost in each state of a few conditions. Sets of parameters, choices
and storages are the bits of Python integers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from frostline.costing.entry import bits_of, numbers_in

State = tuple[bool, ...]


@dataclass(frozen=True)
class Choice:
    """Parameters (bits) that train together. ``fixed``: they train whatever is planned."""

    label: str
    parameters: int
    fixed: bool = False


@dataclass(slots=True)
class Outcome:
    """What a table says of one state.

    Attributes:
        amounts: figure -> what is added to it.
        held: storages that are held.
        either: pairs of storages: the first if something else holds it, or else the second.
        trained: parameters that get a gradient.
        refused: torch refuses this state.
    """

    amounts: Mapping[str, float] = field(default_factory=dict)
    held: int = 0
    either: tuple[tuple[int, int], ...] = ()
    trained: int = 0
    refused: bool = False


@dataclass(slots=True)
class Table:
    """Outcomes by the state of ``conditions`` (parameters, as bits): every state that some choice brings about."""

    conditions: tuple[int, ...]
    outcomes: dict[State, Outcome]

    def state(self, trained: int) -> State:
        return tuple([bits & trained != 0 for bits in self.conditions])


@dataclass
class Problem:
    """Which of ``choices`` are worth most, and what any of them take.

    Attributes:
        values: what it is worth that a parameter gets a gradient; by parameter.
        owned: figure -> what a parameter that gets a gradient adds; by parameter.
        named: figure -> what a parameter that is chosen adds, whether it gets one or not; by parameter.
        stored: figure -> what a held storage adds; by storage, nothing for those it is too short for.
        constants: figure -> what is there whatever trains.
        largest: figure -> (size, parameter, amount): a parameter that gets a gradient adds the amount if no larger one
            of them does.
    """

    choices: Sequence[Choice]
    values: Sequence[float]
    tables: Sequence[Table]
    owned: Mapping[str, Sequence[float]] = field(default_factory=dict)
    named: Mapping[str, Sequence[float]] = field(default_factory=dict)
    stored: Mapping[str, Sequence[float]] = field(default_factory=dict)
    constants: Mapping[str, float] = field(default_factory=dict)
    largest: Mapping[str, Sequence[tuple[int, int, float]]] = field(default_factory=dict)

    @property
    def figures(self) -> set[str]:
        """Every figure that something adds to."""
        told = {figure for table in self.tables for outcome in table.outcomes.values() for figure in outcome.amounts}
        return told | {*self.owned, *self.named, *self.stored, *self.constants, *self.largest}

    @property
    def fixed(self) -> int:
        """The choices that are made already."""
        return bits_of(number for number, choice in enumerate(self.choices) if choice.fixed)

    def parameters(self, chosen: int) -> int:
        """The parameters of some choices."""
        bits = 0
        for number in numbers_in(chosen):
            bits |= self.choices[number].parameters
        return bits

    def choices_in(self, parameters: int) -> int:
        """The choices that hold any of these parameters."""
        return bits_of(number for number, choice in enumerate(self.choices) if choice.parameters & parameters)

    def assess(self, chosen: int) -> Assessment:
        """What some choices take and are worth, added up without a program: what a solution is held to."""
        live = self.parameters(chosen)
        outcomes = [table.outcomes[table.state(live)] for table in self.tables]
        amounts: dict[str, float] = {figure: self.constants.get(figure, 0) for figure in self.figures}
        held = trained = 0
        for outcome in outcomes:
            held |= outcome.held
            trained |= outcome.trained
            for figure, amount in outcome.amounts.items():
                amounts[figure] += amount
        trained &= live
        without = held
        for outcome in outcomes:
            for covered, packed in outcome.either:
                held |= 1 << (covered if without >> covered & 1 else packed)
        for figure, by_storage in self.stored.items():
            amounts[figure] += sum(by_storage[number] for number in numbers_in(held) if number < len(by_storage))
        for figure, by_parameter in self.owned.items():
            amounts[figure] += sum(by_parameter[number] for number in numbers_in(trained))
        for figure, by_parameter in self.named.items():
            amounts[figure] += sum(by_parameter[number] for number in numbers_in(live))
        for figure, entries in self.largest.items():
            there = [entry for entry in entries if trained >> entry[1] & 1]
            most = max((size for size, _, _ in there), default=0)
            amounts[figure] += sum(amount for size, _, amount in there if size == most)
        worth = sum(self.values[number] for number in numbers_in(trained))
        return Assessment(amounts, worth, trained, any(outcome.refused for outcome in outcomes))


@dataclass(frozen=True)
class Assessment:
    """What some choices take, and are worth; ``trained``: the parameters that get a gradient."""

    amounts: Mapping[str, float]
    worth: float
    trained: int
    refused: bool

    def meets(self, limits: Mapping[str, float]) -> bool:
        """Whether something trains, torch does not refuse it, and no limit is broken."""
        within = all(self.amounts.get(figure, 0) <= limit for figure, limit in limits.items())
        return within and bool(self.trained) and not self.refused


def reachable(conditions: Sequence[int], choices: int, fixed: int, most: int) -> Iterator[State]:
    """The states of conditions that some choices bring about; of more than ``most`` it ends early.

    Args:
        conditions: the choices of which any makes each hold.
        choices, fixed: those there are, and those that are made already.

    >>> list(reachable((0b01, 0b11), 0b11, 0, most=9))
    [(False, False), (False, True), (True, True)]
    """
    effects = {0: choices}  # the conditions that a choice makes hold -> the choices that do
    for place, members in enumerate(conditions):
        parted: dict[int, int] = {}
        for effect, those in effects.items():
            for more, part in ((0, those & ~members), (1 << place, those & members)):
                if part:
                    parted[effect | more] = part
        effects = parted
    seen = {bits_of(place for place, members in enumerate(conditions) if members & fixed): None}
    for effect in sorted(set(effects) - {0}):
        for state in list(seen):
            seen.setdefault(state | effect)
        if len(seen) > most:
            break
    for state in seen:
        yield tuple([state >> place & 1 == 1 for place in range(len(conditions))])
