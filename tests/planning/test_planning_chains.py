"""Chains of tensors, as problems of their own: against every subset, and beside the peers' dynamic program."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from benchmarks.peers import Chain, chosen_by_chain
from frostline.planning.problem import Choice, Outcome, Problem, Table
from frostline.planning.program import Program


def problem_of(chain: Chain) -> Problem:
    """Passing by a tensor is paid if that tensor or one further from the loss trains; its own gradient if it does."""
    count = len(chain.own)
    tables = []
    for place, passing in enumerate(chain.passing):
        there, beyond = 1 << place, sum(1 << other for other in range(place, count))
        outcomes = {
            (own, through): Outcome({"cost": passing * through}, trained=there * own)
            for own, through in ((False, False), (False, True), (True, True))
        }
        tables.append(Table((there, beyond), outcomes))
    choices = [Choice(str(place), 1 << place) for place in range(count)]
    return Problem(choices, chain.importance, tables, owned={"cost": chain.own})


def cost_of(chain: Chain, chosen: list[int]) -> float:
    return sum(chain.passing[: max(chosen) + 1]) + sum(chain.own[place] for place in chosen) if chosen else 0


def worth_of(chain: Chain, chosen: list[int]) -> float:
    return sum(chain.importance[place] for place in chosen)


def planned(chain: Chain, limit: float) -> list[int]:
    solution = Program(problem_of(chain), ["cost"]).solve({"cost": limit})
    if solution.chosen is None:
        return []
    assert solution.is_optimal
    return [place for place in range(len(chain.own)) if solution.chosen >> place & 1]


KNOWN = Chain([2, 0, 0], [3, 1, 1], [2.0, 1.0, 5.0])


def test_the_peers_program_misses_the_best_of_a_chain_of_three_and_a_plan_does_not() -> None:
    assert worth_of(KNOWN, chosen_by_chain(KNOWN, 4)) == 1
    assert planned(KNOWN, 4) == [1, 2]
    assert worth_of(KNOWN, planned(KNOWN, 4)) == 6


@pytest.mark.parametrize("seed", range(40))
def test_on_a_chain_no_subset_and_no_choice_of_the_peers_is_worth_more(seed: int) -> None:
    choose = random.Random(seed)
    count = choose.randint(2, 9)
    passing = [choose.choice([0, choose.randint(0, 5)]) for _ in range(count)]
    chain = Chain(passing, [choose.randint(1, 5) for _ in range(count)], [choose.random() for _ in range(count)])
    limit = choose.randint(1, int(sum(chain.passing) + sum(chain.own)))
    every = [list(c) for size in range(1, count + 1) for c in combinations(range(count), size)]
    within = [worth_of(chain, c) for c in every if cost_of(chain, c) <= limit]
    mine, theirs = planned(chain, limit), chosen_by_chain(chain, limit)
    assert cost_of(chain, mine) <= limit
    assert worth_of(chain, mine) == pytest.approx(max(within, default=0.0))
    assert cost_of(chain, theirs) <= limit
    assert worth_of(chain, theirs) <= worth_of(chain, mine) + 1e-9


def test_a_state_that_torch_refuses_is_not_chosen() -> None:
    problem = problem_of(KNOWN)
    for state, outcome in problem.tables[2].outcomes.items():
        outcome.refused = state == (True, True)
    solution = Program(problem, ["cost"]).solve({"cost": 4})
    assert solution.chosen == 0b010  # tensor 0 takes 5, tensor 2 is refused
    assert not problem.assess(0b100).meets({"cost": 4})


def test_what_a_table_says_of_two_conditions_at_once_is_exact() -> None:
    """The third amount is no sum of the others: 1, 1 and, both at once, 5."""
    both = {
        (False, False): Outcome(),
        (True, False): Outcome({"cost": 1}, trained=1),
        (False, True): Outcome({"cost": 1}, trained=2),
        (True, True): Outcome({"cost": 5}, trained=3),
    }
    choices = [Choice("a", 1), Choice("b", 2)]
    for cheap, most in ((5, 4), (1, 2)):  # dearer than the sum, and cheaper
        both[True, True].amounts = {"cost": cheap}
        problem = Problem(choices, [2.0, 3.0], [Table((1, 2), both)])
        assert Program(problem, ["cost"]).solve({"cost": most}).chosen == (0b11 if cheap <= most else 0b10)


def test_a_packed_storage_is_paid_unless_the_whole_one_is_held_anyway() -> None:
    """The first choice packs what the second holds whole: together they take the whole one alone."""
    packs = {(False,): Outcome(), (True,): Outcome(trained=1, either=((0, 1),))}
    holds = {(False,): Outcome(), (True,): Outcome(trained=2, held=1)}
    problem = Problem(
        [Choice("packs", 1), Choice("holds", 2)],
        [1.0, 1.0],
        [Table((1,), packs), Table((2,), holds)],
        stored={"bytes": [32, 8]},
    )
    assert [problem.assess(chosen).amounts["bytes"] for chosen in (1, 2, 3)] == [8, 32, 32]
    program = Program(problem, ["bytes"])
    assert program.solve({"bytes": 32}).chosen == 3
    assert program.solve({"bytes": 31}).chosen == 1
    assert program.solve({"bytes": 7}).is_infeasible
