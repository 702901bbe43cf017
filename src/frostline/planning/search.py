"""Finding the best choices, and proving it: solve, cost again exactly, learn from what was too much, until it holds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from frostline.costing.entry import numbers_in
from frostline.planning.peaks import PEAK, PeakRows
from frostline.planning.problem import Problem
from frostline.planning.program import Program, Solution

if TYPE_CHECKING:
    from frostline.costing.cost import Cost

ROUNDS = 60
"""Candidates that are costed again while a budget that is no sum is met."""
FEW = 12  # choices of which ruling out one candidate after another still proves something
PATIENCE = 3  # ... and candidates ruled out so where there are more
SAME = 1e-9  # of what is won: a bound this close is reached


@dataclass
class Found:
    """The best that was found. ``bound``: nothing within the limits is worth more; ``is_proven``: so is this."""

    chosen: int | None
    worth: float
    bound: float
    timed_out: bool = False

    @property
    def is_proven(self) -> bool:
        return self.chosen is not None and self.bound <= self.worth * (1 + SAME) + 1e-300

    @property
    def is_infeasible(self) -> bool:
        """It was proven that nothing meets the limits."""
        return self.chosen is None and self.bound == -math.inf


class Search:
    """One problem, searched for any limits.

    Args:
        costs: choices -> the exact cost; what a candidate has to meet the limits by.
        amount: what a cost spends of a figure.
        peak: how to learn what a peak is at least, if that has a limit.
    """

    def __init__(
        self, problem: Problem, costs: Callable[[int], Cost], amount: Callable[[Cost, str], float],
        peak: PeakRows | None = None,
    ) -> None:  # fmt: skip
        self.costs = costs
        self.amount = amount
        self.peak = peak
        self.problem = problem if peak is None else peak.first(problem)
        self._programs: dict[tuple[str, ...], Program] = {}

    def best(self, limits: Mapping[str, float], seconds: float, start: int | None = None) -> Found:
        """The choices worth most within ``limits``; ``start``: some that may do, to begin with."""
        deadline = time.perf_counter() + seconds
        found = Found(None, -math.inf, math.inf)
        if start is not None:
            self._offer(found, start, limits)
        excluded: list[int] = []
        for number in range(ROUNDS):
            left = deadline - time.perf_counter()
            if left <= 0 and number:
                found.timed_out = True
                break
            solution = self._solve(limits, excluded, max(left, 1e-3))
            if solution.is_infeasible:
                found.bound = found.worth
                break
            found.bound = min(found.bound, solution.bound)
            if not solution.is_optimal:
                found.timed_out = True
            if solution.chosen is None:
                break
            if self._offer(found, solution.chosen, limits):
                break
            if not self._learn(solution.chosen, limits):
                excluded.append(solution.chosen)
            if found.is_proven or (len(excluded) > PATIENCE and len(self.problem.choices) > FEW):
                break
        if found.chosen is None and found.bound > -math.inf and PEAK in limits:
            self._tighten(found, limits, deadline)
        if not found.is_proven and not found.is_infeasible:
            self._fill(found, limits, max(deadline, time.perf_counter() + min(1.0, seconds / 4)))
        found.bound = max(found.bound, found.worth)
        if found.chosen is not None:
            self._drop_the_worthless(found, limits)
        return found

    def least(self, figure: str, limits: Mapping[str, float], seconds: float) -> tuple[int, float] | None:
        """The choices that take least of a figure while something trains, and how much; None: nothing was found."""
        candidates: list[int] = []
        if figure == PEAK:
            candidates += self._few(limits)
            figures = self.peak.figures if self.peak else []
        else:
            figures = [figure]
        for minimised in figures:
            program = Program(self.problem, self._rows(limits), minimised)
            solution = program.solve(self._spread(limits), seconds=seconds)
            if solution.chosen is not None:
                candidates.append(solution.chosen)
        best: tuple[int, float] | None = None
        for chosen in candidates:
            cost = self._cost(chosen)
            if cost is not None and all(self.amount(cost, name) <= limit for name, limit in limits.items()):
                took = self.amount(cost, figure)
                best = (chosen, took) if best is None or took < best[1] else best
        return best

    # -- candidates ----------------------------------------------------------------------------------------------------

    def _offer(self, found: Found, chosen: int, limits: Mapping[str, float]) -> bool:
        """Take a candidate if it meets every limit by its exact cost; whether it does."""
        assessed = self.problem.assess(chosen)
        if not assessed.trained or assessed.refused:
            return False
        cost = self._cost(chosen)
        if cost is None or any(self.amount(cost, figure) > limit for figure, limit in limits.items()):
            return False
        if assessed.worth > found.worth:
            found.chosen, found.worth = chosen, assessed.worth
        return True

    def _cost(self, chosen: int) -> Cost | None:
        return self.costs(chosen) if self.problem.assess(chosen).trained else None

    def _learn(self, chosen: int, limits: Mapping[str, float]) -> bool:
        """Add the moment at which a candidate's memory was too full; whether the program forbids the candidate now."""
        if self.peak is None or PEAK not in limits:
            return False
        moment = self.costs(chosen).peak
        if moment.nbytes <= limits[PEAK]:
            return False
        learnt = self.peak.learn(self.problem, moment)
        if learnt is None:
            return False
        self.problem = learnt
        self._programs.clear()
        return not self.problem.assess(chosen).meets(self._spread(limits))

    def _tighten(self, found: Found, limits: Mapping[str, float], deadline: float) -> None:
        """Ask for a smaller peak than there may be until what comes out meets the true one, then for a larger one."""
        most, low, high = limits[PEAK], 0.0, None
        margin = 0.0
        for _ in range(12):
            left = deadline - time.perf_counter()
            if left <= 0:
                return
            solution = self._solve({**limits, PEAK: most - margin}, [], left)
            if solution.chosen is None or self._offer(found, solution.chosen, limits):
                high = margin
            else:
                low = margin
                over = self.amount(self.costs(solution.chosen), PEAK) - most
                if high is None:
                    margin += max(over, most / 1000)
                    continue
            margin = (low + high) / 2 if high is not None else margin * 2 + most / 1000

    def _fill(self, found: Found, limits: Mapping[str, float], deadline: float) -> None:
        """Add what still goes in, the most valuable first: to what was found, or to nothing, then without a deadline
        until something does.
        """
        problem = self.problem
        chosen = found.chosen if found.chosen is not None else problem.fixed
        if found.chosen is None and chosen:
            self._offer(found, chosen, limits)
        worth = [sum(problem.values[n] for n in numbers_in(choice.parameters)) for choice in problem.choices]
        for number in sorted(range(len(worth)), key=lambda n: -worth[n]):
            if time.perf_counter() > deadline and found.chosen is not None:
                return
            if not chosen >> number & 1 and self._offer(found, chosen | 1 << number, limits):
                chosen |= 1 << number

    def _drop_the_worthless(self, found: Found, limits: Mapping[str, float]) -> None:
        """Leave out choices that add nothing to what is won, where the rest still meets the limits."""
        assert found.chosen is not None
        for number in numbers_in(found.chosen & ~self.problem.fixed):
            without = found.chosen & ~(1 << number)
            bits = self.problem.choices[number].parameters
            if any(self.problem.values[parameter] for parameter in numbers_in(bits)):
                continue
            assessed = self.problem.assess(without)
            if assessed.trained and assessed.worth == found.worth:
                kept = Found(None, -math.inf, math.inf)
                if self._offer(kept, without, limits):
                    found.chosen = without

    def _few(self, limits: Mapping[str, float]) -> list[int]:
        """Single choices, beside what is fixed, for a figure that is no sum."""
        problem = self.problem
        if problem.fixed and len(problem.choices) == 1:
            return [problem.fixed]
        singles = [problem.fixed | 1 << n for n in range(len(problem.choices))]
        first = [problem.fixed] if problem.fixed else []
        return first + [s for s in singles if problem.assess(s).trained][:200]

    # -- the program ---------------------------------------------------------------------------------------------------

    def _rows(self, limits: Mapping[str, float]) -> list[str]:
        return [name for figure in limits for name in (self._peaks() if figure == PEAK else [figure])]

    def _peaks(self) -> list[str]:
        return self.peak.figures if self.peak is not None else []

    def _spread(self, limits: Mapping[str, float]) -> dict[str, float]:
        """The limits of the program's figures: a peak's is that of every moment."""
        found: dict[str, float] = {}
        for figure, limit in limits.items():
            for name in self._peaks() if figure == PEAK else [figure]:
                found[name] = limit
        return found

    def _solve(self, limits: Mapping[str, float], excluded: list[int], seconds: float) -> Solution:
        rows = tuple(self._rows(limits))
        if rows not in self._programs:
            self._programs[rows] = Program(self.problem, rows)
        return self._programs[rows].solve(self._spread(limits), excluded=excluded, seconds=seconds)
