"""The integer program: a `Problem` in linear constraints, solved by HiGHS.

Binary: whether a choice is made, and whether a condition holds (it is the OR of choices and of smaller conditions). All
else follows from those. What a table adds to a figure is a sum over its conditions where that is exact for every state
that can be; elsewhere its states get an indicator each, tied to the conditions, which are 0 or 1 once those are. A
storage is paid once, if any state that comes about holds it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np

from frostline.costing.entry import bits_of, numbers_in
from frostline.planning.problem import Problem, State

_ROW = 1e5  # what the limit of a row is scaled to: HiGHS lets a row be broken by 1e-6
_WORTH = 1e5  # ... and what everything is worth: it stops at a gap of 1e-6


@dataclass(slots=True)
class Sum:
    """``constant`` + the sum of ``terms`` (variable -> factor)."""

    terms: dict[int, float]
    constant: float = 0

    def add(self, other: Sum, factor: float = 1) -> None:
        self.constant += factor * other.constant
        for variable, value in other.terms.items():
            self.terms[variable] = self.terms.get(variable, 0) + factor * value


@dataclass(frozen=True)
class Solution:
    """What one solve found.

    Attributes:
        chosen: choices; None if nothing was found.
        bound: no choices that meet the limits are worth more (or, minimised, take less).
        is_optimal: it was proven; False if time ran out.
        is_infeasible: no choices meet the limits.
    """

    chosen: int | None
    bound: float
    is_optimal: bool
    is_infeasible: bool


class Program:
    """One problem, ready to be solved for any limits of some figures.

    Args:
        figures: which figures have limits.
        minimised: a figure to make small, in place of worth to be won.
    """

    def __init__(self, problem: Problem, figures: Iterable[str], minimised: str | None = None) -> None:
        self.problem = problem
        self.figures = tuple(dict.fromkeys(figures))
        self.minimised = minimised
        self._lower: list[float] = []
        self._upper: list[float] = []
        self._integral: list[bool] = []
        self._rows: list[tuple[dict[int, float], float, float]] = []
        self._conditions: dict[int, Sum] = {}  # by choices
        self._indicators: dict[int, dict[State, int]] = {}  # by table, where it needs them
        self._storages: dict[int, Sum] = {}
        self.x = [self._variable(choice.fixed, True, True) for choice in problem.choices]
        self._fixed = problem.fixed
        self._free = {bits: self._one(n) for n, bits in enumerate(c.parameters for c in problem.choices)}
        self._gather_conditions()
        self.gets_gradient = self._find_gradients()
        if not any(choice.fixed for choice in problem.choices):
            self._row(self._total(list(self.gets_gradient.values())), 1, math.inf)
        self._refuse()
        wanted = [*self.figures, *([minimised] if minimised else [])]
        held = {s for figure in wanted for s, amount in enumerate(problem.stored.get(figure, ())) if amount}
        self._hold(held)
        self.sums = {figure: self._sum_of(figure) for figure in wanted}
        self.worth = Sum({})
        for parameter, expression in self.gets_gradient.items():
            self.worth.add(expression, problem.values[parameter])

    # -- pieces --------------------------------------------------------------------------------------------------------

    def _variable(self, lower: float = 0, upper: float = 1, integral: bool = False) -> int:
        self._lower.append(float(lower))
        self._upper.append(float(upper))
        self._integral.append(integral)
        return len(self._lower) - 1

    def _one(self, choice: int) -> Sum:
        return Sum({}, 1) if self.problem.choices[choice].fixed else Sum({self.x[choice]: 1})

    def _row(self, expression: Sum, least: float, most: float) -> None:
        terms = {variable: value for variable, value in expression.terms.items() if value}
        self._rows.append((terms, least - expression.constant, most - expression.constant))

    @staticmethod
    def _total(parts: Iterable[Sum]) -> Sum:
        found = Sum({})
        for part in parts:
            found.add(part)
        return found

    def _any(self, parts: Sequence[Sum], integral: bool) -> Sum:
        """1 if any of the parts (0 or 1 each) is 1, or else 0."""
        if any(part.constant == 1 and not part.terms for part in parts):
            return Sum({}, 1)
        parts = [part for part in parts if part.terms or part.constant]
        if len(parts) < 2:
            return parts[0] if parts else Sum({})
        variable = self._variable(integral=integral)
        every = Sum({variable: -1})
        for part in parts:
            every.add(part)
            above = Sum({variable: 1})
            above.add(part, -1)
            self._row(above, 0, math.inf)
        self._row(every, 0, math.inf)
        return Sum({variable: 1})

    def _gather_conditions(self) -> None:
        """Every condition by smaller ones, the largest first, and by single choices for the rest."""
        problem = self.problem
        self._choices_of: dict[int, int] = {}
        for table in problem.tables:
            for bits in table.conditions:
                if bits not in self._choices_of:
                    self._choices_of[bits] = problem.choices_in(bits)
        for choices in sorted(set(self._choices_of.values()), key=int.bit_count):
            if choices & self._fixed:
                self._conditions[choices] = Sum({}, 1)
                continue
            rest, parts = choices, []
            for smaller in reversed(self._conditions):
                if not rest:
                    break
                if smaller & rest and not smaller & ~choices:
                    parts.append(self._conditions[smaller])
                    rest &= ~smaller
            parts += [self._one(number) for number in numbers_in(rest)]
            self._conditions[choices] = self._any(parts, integral=True)

    def _condition(self, bits: int) -> Sum:
        return self._conditions[self._choices_of[bits]]

    # -- what a table says ---------------------------------------------------------------------------------------------

    def _function(self, number: int, values: Sequence[float]) -> Sum:
        """What a table says, as a sum: of conditions where that is exact, or else of its states' indicators."""
        table = self.problem.tables[number]
        if not any(values):
            return Sum({})
        factors = _linear(tuple(table.outcomes), tuple(values))
        if factors is not None:
            found = Sum({}, factors[0])
            for bits, factor in zip(table.conditions, factors[1:], strict=True):
                if factor:
                    found.add(self._condition(bits), factor)
            return found
        indicators = self._indicate(number)
        return Sum({indicators[s]: value for s, value in zip(table.outcomes, values, strict=True) if value})

    def _indicate(self, number: int) -> dict[State, int]:
        found = self._indicators.get(number)
        if found is None:
            table = self.problem.tables[number]
            found = self._indicators[number] = {state: self._variable() for state in table.outcomes}
            self._row(Sum(dict.fromkeys(found.values(), 1.0)), 1, 1)
            for place, bits in enumerate(table.conditions):
                total = Sum({variable: 1 for state, variable in found.items() if state[place]})
                total.add(self._condition(bits), -1)
                self._row(total, 0, 0)
        return found

    def _either_of(self, number: int, flags: Sequence[bool]) -> list[Sum]:
        """Whether a table is in one of the flagged states, as parts of an OR: conditions, if that is exact."""
        table = self.problem.tables[number]
        found = _alternatives(tuple(table.outcomes), tuple(flags))
        if found is not None:
            return [self._condition(table.conditions[place]) for place in found]
        return [self._function(number, [float(flag) for flag in flags])]

    def _find_gradients(self) -> dict[int, Sum]:
        """Parameter -> 1 if it gets a gradient."""
        problem = self.problem
        open_ = problem.parameters(bits_of(range(len(problem.choices))))
        by_parameter: dict[int, list[int]] = {}
        for number, table in enumerate(problem.tables):
            every = 0
            for outcome in table.outcomes.values():
                every |= outcome.trained
            for parameter in numbers_in(every & open_):
                by_parameter.setdefault(parameter, []).append(number)
        found = {}
        for number, choice in enumerate(problem.choices):
            one = self._one(number)
            for parameter in numbers_in(choice.parameters):
                parts: list[Sum] = []
                for at in by_parameter.get(parameter, ()):
                    table = problem.tables[at]
                    parts += self._either_of(at, [o.trained >> parameter & 1 == 1 for o in table.outcomes.values()])
                same = any(part.terms == one.terms and part.constant == one.constant for part in parts)
                found[parameter] = one if same else self._any(parts, integral=False)
        return found

    def _refuse(self) -> None:
        for number, table in enumerate(self.problem.tables):
            flags = [float(outcome.refused) for outcome in table.outcomes.values()]
            if any(flags):
                self._row(self._function(number, flags), 0, 0)

    # -- what is held --------------------------------------------------------------------------------------------------

    def _hold(self, wanted: set[int]) -> None:
        """A variable for each storage that may be held; one for all that are held alike."""
        tables = self.problem.tables
        holders: dict[int, list[tuple[int, int]]] = {}  # storage -> (table, its states that hold it)
        packed: dict[tuple[int, int], list[tuple[int, int]]] = {}
        covering = set()
        for number, table in enumerate(tables):
            held: dict[int, int] = {}
            either: dict[tuple[int, int], int] = {}
            for place, outcome in enumerate(table.outcomes.values()):
                for storage in numbers_in(outcome.held):
                    held[storage] = held.get(storage, 0) | 1 << place
                for pair in outcome.either:
                    either[pair] = either.get(pair, 0) | 1 << place
                    covering.add(pair[0])
            for storage, places in held.items():
                holders.setdefault(storage, []).append((number, places))
            for pair, places in either.items():
                packed.setdefault(pair, []).append((number, places))
        known: dict[tuple[tuple[int, int], ...], Sum] = {}
        for storage in sorted(wanted | covering):
            self._storages[storage] = self._held_where(holders.get(storage, []), known)
        beside: dict[int, list[Sum]] = {}
        for (covered, instead), askers in packed.items():
            if instead in wanted:
                asked = self._held_where(askers, known)
                beside.setdefault(instead, []).append(self._without(asked, self._storages[covered]))
        for storage, more in beside.items():
            self._storages[storage] = self._any([self._storages[storage], *more], integral=False)

    def _held_where(self, holders: list[tuple[int, int]], known: dict[Any, Sum]) -> Sum:
        parts: dict[tuple[tuple[int, float], ...], Sum] = {}
        for number, places in holders:
            flags = [places >> place & 1 == 1 for place in range(len(self.problem.tables[number].outcomes))]
            for part in self._either_of(number, flags):
                parts.setdefault((*sorted(part.terms.items()), (-1, part.constant)), part)
        key = tuple(sorted(parts))
        if key not in known:
            known[key] = self._any(list(parts.values()), integral=False)
        return known[key]

    def _without(self, asked: Sum, whole: Sum) -> Sum:
        """1 if ``asked`` is and ``whole`` is not."""
        variable = self._variable()
        least = Sum({variable: 1})
        least.add(asked, -1)
        least.add(whole)
        self._row(least, 0, math.inf)
        for other in (asked, Sum({key: -value for key, value in whole.terms.items()}, 1 - whole.constant)):
            most = Sum({variable: -1})
            most.add(other)
            self._row(most, 0, math.inf)
        return Sum({variable: 1})

    # -- figures -------------------------------------------------------------------------------------------------------

    def _sum_of(self, figure: str) -> Sum:
        problem = self.problem
        total = Sum({}, problem.constants.get(figure, 0))
        for number, table in enumerate(problem.tables):
            values = [outcome.amounts.get(figure, 0) for outcome in table.outcomes.values()]
            total.add(self._function(number, values))
        for storage, amount in enumerate(problem.stored.get(figure, ())):
            if amount:
                total.add(self._storages[storage], amount)
        for parameter, amount in enumerate(problem.owned.get(figure, ())):
            if amount and parameter in self.gets_gradient:
                total.add(self.gets_gradient[parameter], amount)
        named = problem.named.get(figure)
        if named is not None:
            for number, choice in enumerate(problem.choices):
                total.add(self._one(number), sum(named[parameter] for parameter in numbers_in(choice.parameters)))
        entries = sorted(problem.largest.get(figure, ()), reverse=True)
        larger: Sum = Sum({})
        for size in sorted({size for size, _, _ in entries}, reverse=True):
            own = [entry for entry in entries if entry[0] == size and entry[1] in self.gets_gradient]
            for _, parameter, amount in own:
                total.add(self._without(self.gets_gradient[parameter], larger), amount)
            larger = self._any([larger, *(self.gets_gradient[parameter] for _, parameter, _ in own)], integral=False)
        return total

    # -- solving -------------------------------------------------------------------------------------------------------

    def solve(
        self, limits: Mapping[str, float], *, excluded: Iterable[int] = (), seconds: float = 10.0, gap: float = 0.0
    ) -> Solution:
        """The choices worth most (or that take least) within ``limits``.

        Args:
            excluded: choices that are not to be made exactly so.
            seconds: when to stop.
            gap: how far from the best, as a share of it, is good enough.
        """
        from scipy.optimize import Bounds, LinearConstraint  # (scipy takes long to import)

        started = time.perf_counter()
        rows = list(self._rows)
        for figure in self.figures:
            if math.isfinite(limits.get(figure, math.inf)):
                rows.append(_scaled(self.sums[figure], limits[figure]))
        for made in excluded:
            terms = {self.x[n]: -1.0 if made >> n & 1 else 1.0 for n in range(len(self.x))}
            rows.append((terms, 1.0 - made.bit_count(), math.inf))
        target = self.sums[self.minimised] if self.minimised else self.worth
        whole = sum(abs(value) for value in target.terms.values())
        scale = (1 if self.minimised else -1) * _WORTH / (whole or 1)
        costs = np.zeros(len(self._lower))
        for variable, value in target.terms.items():
            costs[variable] = value * scale
        if not rows:
            rows = [({}, 0.0, 0.0)]
        matrix = _matrix([terms for terms, _, _ in rows], len(self._lower))
        if any(not terms and not least <= 0 <= most for terms, least, most in rows):
            return Solution(None, -math.inf, True, True)
        found = milp(
            costs,
            integrality=np.array(self._integral, dtype=np.int8),
            bounds=Bounds(np.array(self._lower), np.array(self._upper)),
            constraints=LinearConstraint(matrix, [row[1] for row in rows], [row[2] for row in rows]),
            options={
                "time_limit": max(seconds - (time.perf_counter() - started), 1e-3),
                "mip_rel_gap": gap,
                "presolve": True,
            },
        )
        infeasible = found.status == 2
        chosen: int | None = None
        if found.x is not None:
            chosen = bits_of(n for n, variable in enumerate(self.x) if found.x[variable] > 0.5) | self._fixed
        dual = found.mip_dual_bound
        bound = target.constant + (dual / scale if dual is not None and math.isfinite(dual) else whole)
        return Solution(chosen, bound, found.status == 0, infeasible)


def milp(*arguments: Any, **named: Any) -> Any:
    """HiGHS, through scipy."""
    from scipy.optimize import milp as solved

    return solved(*arguments, **named)


def _matrix(rows: Sequence[dict[int, float]], width: int) -> Any:
    from scipy.sparse import csr_array

    starts = np.cumsum([0, *(len(terms) for terms in rows)])
    columns = np.fromiter((variable for terms in rows for variable in terms), dtype=np.int32, count=starts[-1])
    values = np.fromiter((value for terms in rows for value in terms.values()), dtype=np.float64, count=starts[-1])
    return csr_array((values, columns, starts), shape=(len(rows), width))


def _scaled(expression: Sum, limit: float) -> tuple[dict[int, float], float, float]:
    """A row at most ``limit``: in whole numbers by their common divisor if they are, and of a size HiGHS can judge."""
    terms = {variable: value for variable, value in expression.terms.items() if value}
    most = limit - expression.constant
    values = list(terms.values())
    if values and all(float(value).is_integer() for value in values):
        divisor = math.gcd(*(int(value) for value in values))
        terms = {variable: value / divisor for variable, value in terms.items()}
        most = math.floor(most) // divisor
    size = max([abs(most), *(abs(value) for value in terms.values())], default=1) or 1
    factor = 1.0 if 10 < size < 10 * _ROW else _ROW / size
    return {variable: value * factor for variable, value in terms.items()}, -math.inf, most * factor


@cache
def _basis(states: tuple[State, ...]) -> tuple[Any, Any]:
    """Which columns (the constant, then the conditions) of the states are independent, and what solves for them."""
    full = np.array([[1.0, *state] for state in states])
    columns: list[int] = []
    for column in range(full.shape[1]):
        if np.linalg.matrix_rank(full[:, [*columns, column]]) > len(columns):
            columns.append(column)
    return tuple(columns), np.linalg.pinv(full[:, columns])


@lru_cache(maxsize=1 << 16)
def _linear(states: tuple[State, ...], values: tuple[float, ...]) -> tuple[float, ...] | None:
    """The constant and a factor per condition that give every state its value; None if none do exactly."""
    columns, inverse = _basis(states)
    found = inverse @ np.array(values, dtype=np.float64)
    whole = all(isinstance(value, int) or float(value).is_integer() for value in values)
    size = max(map(abs, values))
    if whole:
        found = np.round(found)
    elif size:
        found = np.where(np.abs(found) < 1e-12 * size, 0.0, found)
    factors: list[float] = [0] * (len(states[0]) + 1)
    for column, factor in zip(columns, found, strict=True):
        factors[column] = int(factor) if whole else float(factor)
    for state, value in zip(states, values, strict=True):
        said = factors[0] + sum(factor for factor, flag in zip(factors[1:], state, strict=True) if flag)
        if said != value if whole else abs(said - value) > 1e-12 * size:
            return None
    return tuple(factors)


@lru_cache(maxsize=1 << 16)
def _alternatives(states: tuple[State, ...], flags: tuple[bool, ...]) -> tuple[int, ...] | None:
    """The conditions of which any says that a state is flagged; None if that is not how they are."""
    places = tuple(
        place
        for place in range(len(states[0]))
        if all(flag for state, flag in zip(states, flags, strict=True) if state[place])
    )
    said = [any(state[place] for place in places) for state in states]
    if said != list(flags):
        return None
    # A condition that holds only where another of them does says nothing new.
    needed = [
        place
        for place in places
        if not any(
            other != place
            and all(state[other] for state in states if state[place])
            and (other < place or not all(state[place] for state in states if state[other]))
            for other in places
        )
    ]
    return tuple(needed)
