"""``fl.plan``: the subset worth most of those that a budget allows, with a certificate."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from frostline.costing.cost import Cost
from frostline.costing.entry import bits_of, numbers_in
from frostline.errors import FrostlineError, PlanError, TraceError
from frostline.planning.budgets import Budget, read_budgets, spent
from frostline.planning.choices import Offer, offer
from frostline.planning.peaks import PEAK, PeakRows
from frostline.planning.problem import Choice, Problem
from frostline.planning.result import Plan, gap_of, planned_subset
from frostline.planning.search import Found, Search
from frostline.planning.tables import Entangled, Tabulator, gets_gradient
from frostline.subsets.names import listed

if TYPE_CHECKING:
    from frostline.tracing.trace import Trace

METHODS = ("freeze", "train-only")
MOST_RUNS = 256
"""Subsets that are tried where each is a run of the whole step."""


def plan(
    trace: Trace,
    budget: Mapping[str, Any],
    importance: Any,
    *,
    always: Any = None,
    never: Any = None,
    method: str = "freeze",
    by: str = "tensor",
    optimizer: Any = "adamw",
    time_limit: float = 10.0,
) -> Plan:
    """Find the subset whose importance is largest within a budget.

    An integer program on the trace's own calls, solved by HiGHS: a trained parameter needs its grad_weight and opens
    every grad_input between itself and the loss, paths that several share are paid once, and kept tensors follow the
    probes. What comes out is costed again exactly, and meets every budget by that cost.

    >>> import torch, frostline as fl
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> trace = fl.trace(model, torch.randn(4, 8), loss=lambda y: y.sum())
    >>> worth = {"0.weight": 5.0, "0.bias": 1.0, "2.weight": 2.0, "2.bias": 1.0}
    >>> plan = fl.plan(trace, {"step_flops": "80%"}, worth)
    >>> plan.subset.names, plan.objective, plan.gap
    (('0.bias', '2.weight', '2.bias'), 4.0, 0.0)

    Args:
        budget: figure -> what it may take: a number, a text such as ``"4 GiB"``, or a share of training everything by
            ``freeze``, ``"50%"``. Figures: step_seconds (of a calibrated trace), step_flops, backward_flops,
            peak_bytes, saved_bytes, optimizer_bytes, trainable_parameters. Several hold at once.
        importance: parameter name -> what training it is worth, at least 0; or an object with such ``scores``.
            Parameters that get no gradient count nothing.
        always: what trains in any case, as ``train=`` takes it; ``never``: what does not.
        method: ``"freeze"`` or ``"train-only"``.
        by: ``"tensor"``, or ``"layer"``: a repeated block (see `frostline.subsets.blocks`) trains as a whole or not at
            all, and so does what a module outside of them owns.
        time_limit: seconds for the search; what was found by then is returned with its honest gap.

    Raises:
        PlanError: nothing meets the budget (says the least that does), or it or the importance cannot be read.
    """
    started = time.perf_counter()
    planner = Planner(trace, importance, always, never, method, by, optimizer)
    budgets = read_budgets(budget, planner.full)
    return planner.plan(budgets, time_limit, started)


class Planner:
    """One trace, importance and method, planned for any budgets."""

    def __init__(
        self, trace: Trace, importance: Any, always: Any, never: Any, method: str, by: str, optimizer: Any
    ) -> None:
        from frostline.tracing.trace import Trace

        if not isinstance(trace, Trace):
            raise PlanError(
                f"plan takes a trace, got {type(trace).__name__}: write fl.plan(fl.trace(model, inputs), ...)"
            )
        if method not in METHODS:
            raise PlanError(f"plans are for method {' or '.join(METHODS)}, not {method!r}")
        self.trace = trace
        self.method = method
        self.optimizer = optimizer
        self.offer: Offer = offer(trace, importance, always, never, by)
        self.parameters = {name: tuple(p.shape) for name, p in trace.parameters.items()}
        self.notes: list[str] = []
        self._costs: dict[int, Cost] = {}
        self._searches: dict[tuple[str, ...], Search] = {}

    @cached_property
    def full(self) -> Cost:
        """What shares are shares of."""
        return self.trace.cost("@all", optimizer=self.optimizer)

    # -- one plan ------------------------------------------------------------------------------------------------------

    def plan(
        self, budgets: Sequence[Budget], time_limit: float, started: float | None = None, start: int | None = None
    ) -> Plan:
        """The best within ``budgets``; ``start``: parameters that may do, to begin with."""
        started = time.perf_counter() if started is None else started
        if not (isinstance(time_limit, (int, float)) and time_limit > 0):
            raise PlanError(f"time_limit must be a number of seconds above 0, got {time_limit!r}")
        budgets = tuple(budgets)
        limits = {budget.figure: budget.limit for budget in budgets}
        try:
            search = self.search(tuple(limits))
        except Entangled as why:
            return self._exhaust(budgets, time_limit, started, str(why))
        begin = None if start is None else search.problem.choices_in(start) | search.problem.fixed
        found = search.best(limits, time_limit, begin)
        if found.chosen is None:
            raise self._refusal(search, budgets, found, time_limit)
        return self._made(search.problem, budgets, found, started)

    def search(self, figures: tuple[str, ...]) -> Search:
        """The search for budgets of these figures.

        Raises:
            Entangled: every subset is a run of the whole step.
        """
        figures = tuple(sorted(figures))
        if figures not in self._searches:
            tabulator = Tabulator(self.trace, self.method, self.optimizer)
            problem = self._reached(tabulator.problem(self.offer.choices, self.offer.values, figures))
            problem = self._known(problem)
            peak = None
            if PEAK in figures:
                peak = PeakRows(tabulator, problem, self._any_cost(problem))
            self._searches[figures] = Search(problem, lambda chosen: self._cost(problem, chosen), spent, peak)
        return self._searches[figures]

    def _reached(self, problem: Problem) -> Problem:
        """Without what gets no gradient whatever trains: it is no importance won."""
        reached = gets_gradient(problem)
        names = self.offer.names
        lost = [names[n] for n in numbers_in(problem.parameters(problem.fixed) & ~reached)]
        if lost:
            raise PlanError(f"always= names {listed(lost, 3)}, which the loss does not reach: take it out")
        choices = [replace(choice, parameters=choice.parameters & reached) for choice in problem.choices]
        return self._without_empty(problem, choices)

    def _known(self, problem: Problem) -> Problem:
        """Without what the optimizer refuses the gradient of, where its bytes are budgeted."""
        unknown = bits_of(n for n, nbytes in enumerate(problem.owned.get("optimizer_bytes", ())) if nbytes == math.inf)
        if not unknown:
            return problem
        names = [self.offer.names[n] for n in numbers_in(unknown)]
        said = (
            f"{self.optimizer} refuses the sparse gradients of {listed(names, 3)}, so what it would keep is not known"
        )
        if unknown & problem.parameters(problem.fixed):
            raise PlanError(f"{said}: take it out of always=, or choose another optimizer")
        self.notes.append(f"{said}: not planned for")
        owned = {
            **problem.owned,
            "optimizer_bytes": [0 if n == math.inf else n for n in problem.owned["optimizer_bytes"]],
        }
        choices = [replace(choice, parameters=choice.parameters & ~unknown) for choice in problem.choices]
        return self._without_empty(replace(problem, owned=owned), choices)

    @staticmethod
    def _without_empty(problem: Problem, choices: Sequence[Choice]) -> Problem:
        left = [choice for choice in choices if choice.parameters]
        if not left:
            raise PlanError("the loss reaches nothing that may train: leave more to choose from")
        return replace(problem, choices=left)

    def _any_cost(self, problem: Problem) -> Cost:
        every = (1 << len(problem.choices)) - 1
        return self._cost(problem, every)

    def _cost(self, problem: Problem, chosen: int) -> Cost:
        """The exact cost of some choices."""
        return self.cost_of(problem.parameters(chosen))

    def cost_of(self, parameters: int) -> Cost:
        """The exact cost of some parameters (bits)."""
        if parameters not in self._costs:
            if len(self._costs) > 256:
                self._costs.clear()
            names = tuple([self.offer.names[n] for n in numbers_in(parameters)])
            subset = planned_subset(names, self.parameters, ())
            self._costs[parameters] = self.trace.cost(subset, method=self.method, optimizer=self.optimizer)
        return self._costs[parameters]

    def _made(self, problem: Problem, budgets: tuple[Budget, ...], found: Found, started: float) -> Plan:
        assert found.chosen is not None
        notes = list(self.notes)
        bound = found.bound if math.isfinite(found.bound) else None
        gap = gap_of(found.worth, bound)
        if found.timed_out and gap != 0:
            notes.append("the time limit was reached: a longer time_limit= may find more, or prove that there is none")
        total = sum(problem.values[n] for n in numbers_in(self._gains(problem)))
        return self.made(problem.parameters(found.chosen), budgets, found.worth, total, bound, gap, started, notes)

    @staticmethod
    def _gains(problem: Problem) -> int:
        return problem.assess((1 << len(problem.choices)) - 1).trained

    def made(
        self, parameters: int, budgets: tuple[Budget, ...], worth: float, total: float, bound: float | None,
        gap: float | None, started: float, notes: Sequence[str],
    ) -> Plan:  # fmt: skip
        """The plan, costed once more and held to its budgets."""
        from frostline import __version__

        names = tuple([self.offer.names[n] for n in numbers_in(parameters)])
        subset = planned_subset(names, self.parameters, budgets)
        cost = self.trace.cost(subset, method=self.method, optimizer=self.optimizer)
        broken = [budget for budget in budgets if not budget.allows(cost)]
        if broken:
            raise AssertionError(
                f"a plan costs {spent(cost, broken[0].figure)} {broken[0].figure}, over its budget of {broken[0].limit}"
            )
        got = {name for name in names if name not in cost.unreached}
        counted = sum(self.offer.scores[name] for name in names if name in got)
        if not math.isclose(counted, worth, rel_tol=1e-9, abs_tol=1e-300):
            raise AssertionError(f"a plan is worth {counted}, and was taken to be worth {worth}")
        versions = {"frostline": __version__, "torch": torch.__version__.split("+")[0]}
        return Plan(
            subset, cost, budgets, worth, total, bound, gap, time.perf_counter() - started, self.method, cost.optimizer,
            self.offer.by, self.offer.scores, self.offer.source, self.offer.always, self.offer.never, self.parameters,
            versions, tuple(notes),
        )  # fmt: skip

    # -- nothing fits --------------------------------------------------------------------------------------------------

    def _refusal(self, search: Search, budgets: tuple[Budget, ...], found: Found, seconds: float) -> PlanError:
        """Say the least that would do, and what it buys."""
        from frostline.reports.findings import trained_words
        from frostline.reports.units import amount_text

        if not found.is_infeasible and found.timed_out:
            return PlanError(
                f"the time limit of {seconds} s was reached before any subset within the budget was found: give a "
                "longer time_limit="
            )
        problem = search.problem
        if problem.fixed:
            cost = self._cost(problem, problem.fixed)
            for budget in budgets:
                if not budget.allows(cost):
                    took = amount_text(budget.figure, spent(cost, budget.figure))
                    return PlanError(
                        f"always= ({trained_words(cost)}) takes {took} of {budget.figure} by itself, over the budget "
                        f"of {self._said(budget)}: raise that to at least {took}, or train less always"
                    )
        told = []
        for budget in budgets:
            alone = search.least(budget.figure, {}, seconds)
            if alone is not None and alone[1] > budget.limit:
                told.append(self._least(search, budget, alone[1], {}, seconds))
        if not told:
            for budget in budgets:
                rest = {other.figure: other.limit for other in budgets if other is not budget}
                least = search.least(budget.figure, rest, seconds)
                if least is not None:
                    told.append(
                        f"within the rest of the budget, {self._least(search, budget, least[1], rest, seconds)}"
                    )
                    break
        if not told:
            told.append("its parts exclude each other: raise one of them")
        return PlanError(f"no subset meets the budget: {'; '.join(told)}")

    def _least(self, search: Search, budget: Budget, least: float, rest: Mapping[str, float], seconds: float) -> str:
        from frostline.reports.findings import trained_words
        from frostline.reports.units import amount_text

        limits = {**rest, budget.figure: least}
        best = search.best(limits, seconds)
        buys = ""
        if best.chosen is not None:
            cost = self._cost(search.problem, best.chosen)
            total = sum(search.problem.values[n] for n in numbers_in(self._gains(search.problem))) or 1.0
            buys = f", which buys {trained_words(cost)} ({100 * best.worth / total:.3g} % of the importance)"
        word = "the least found" if budget.figure == PEAK else "the least possible"
        return (
            f"{budget.figure} {self._said(budget)} is below {word}, {amount_text(budget.figure, least)}{buys}: give at "
            "least that"
        )

    @staticmethod
    def _said(budget: Budget) -> str:
        from frostline.reports.units import amount_text

        text = amount_text(budget.figure, budget.limit)
        if budget.asked.endswith("%"):
            return f"{budget.asked} ({text})"
        return text if budget.limit else budget.asked  # (a part of one, rounded down)

    # -- a step that cannot be taken apart -----------------------------------------------------------------------------

    def _exhaust(self, budgets: tuple[Budget, ...], seconds: float, started: float, why: str) -> Plan:
        """Try every subset: each is a run of the whole step."""
        choices = [choice for choice in self.offer.choices if not choice.fixed]
        fixed = bits_of(n for choice in self.offer.choices if choice.fixed for n in numbers_in(choice.parameters))
        if 1 << len(choices) > MOST_RUNS:
            raise PlanError(
                f"each subset of this model is a run of the whole step ({why}), too many for {len(choices)} "
                f"{self.offer.by}s: leave at most {MOST_RUNS.bit_length() - 1} to choose from with never= or "
                "by='layer', or compare a few subsets with trace.cost"
            )
        values = self.offer.values
        deadline = time.perf_counter() + seconds
        best: tuple[float, int] | None = None
        tried, total = 0, 0.0
        for number in reversed(range(1 << len(choices))):
            if tried and time.perf_counter() > deadline:
                break
            tried += 1
            bits = fixed
            for place in numbers_in(number):
                bits |= choices[place].parameters
            worth = self._worth_of_run(bits, values, budgets)
            total = max(total, worth[1])
            if worth[0] is not None and (best is None or worth[0] > best[0]):
                best = (worth[0], bits)
        whole = tried == 1 << len(choices)
        if best is None:
            ended = "none of them" if whole else f"none of the {tried} tried before the time limit"
            raise PlanError(f"no subset meets the budget: of {1 << len(choices)} subsets, {ended}; raise the budget")
        note = f"each subset is a run of the whole step ({why}): {tried} of {1 << len(choices)} were tried"
        bound = best[0] if whole else None
        gap = 0.0 if whole else None
        return self.made(best[1], budgets, best[0], total, bound, gap, started, [*self.notes, note])

    def _worth_of_run(
        self, bits: int, values: Sequence[float], budgets: Sequence[Budget]
    ) -> tuple[float | None, float]:
        """What a subset is worth if it meets the budgets, and whether it does or not; 0 if the loss misses it."""
        if not bits:
            return None, 0.0
        try:
            cost = self.cost_of(bits)
        except TraceError:
            return None, 0.0
        except FrostlineError as error:
            if "torch refuses" in str(error):
                return None, 0.0
            raise
        numbers = self.trace.parameter_numbers
        worth = sum(values[numbers[name]] for name in cost.subset.names if name not in cost.unreached)
        return (worth if all(budget.allows(cost) for budget in budgets) else None), worth
