"""``frozen-moved``: an optimizer goes on moving parameters after they were frozen."""

from __future__ import annotations

from collections.abc import Iterator

from frostline.watching.finding import Finding, Level
from frostline.watching.record import ModelFact, MovedFact, ParameterFact, Record
from frostline.watching.rules import Rule
from frostline.watching.steps import Steps
from frostline.watching.wording import before, called, count, made, modules_of, named, names_of, parts_of

ID = "frozen-moved"
FINE = "the last momentum is meant to run out after the freezing."


def find(record: Record, steps: Steps) -> Iterator[Finding]:
    """Parameters without ``requires_grad``, but with it before, whose values changed within an optimizer's own step.

    What never required it is moved on purpose: its ``.grad`` was written by hand (evolution strategies).
    """
    for model in record.models:
        frozen = {number for number, fact in model.parameters.items() if fact.was_trainable or fact.reached}
        moves = [move for move in record.frozen_moves if move.parameter in frozen]
        if moves:
            facts = [fact for n, fact in model.parameters.items() if any(move.parameter == n for move in moves)]
            yield _finding(record, model, facts, moves)


def _finding(record: Record, model: ModelFact, facts: list[ParameterFact], moves: list[MovedFact]) -> Finding:
    numbers = {move.optimizer for move in moves}
    optimizers = [each for each in record.optimizers if each.number in numbers]
    most = max(moves, key=lambda move: move.most)
    place = optimizers[0].step_place
    code = f"for parameter in {called(model, place)}.parameters():\n    if not parameter.requires_grad:\n"
    code += "        parameter.grad = None"
    return Finding(
        rule=ID,
        level=Level.WRONG,
        text=f"{named(record, model, parts_of(model, facts))} is frozen (requires_grad=False), and "
        f"{' and '.join(map(made, optimizers))} goes on moving it: it still has a .grad, so momentum and weight decay "
        "are applied.",
        place=str(place or ""),
        parameters=names_of(record, model, facts),
        modules=modules_of(record, model, facts),
        evidence=(
            f"{count(len(facts), 'frozen tensor')} changed in optimizer step {min(move.step for move in moves)}; "
            f"{record.spelled(model, model.parameters[most.parameter].name)} by up to {most.most:.3g} in one step",
            "their .grad was not None (zero_grad(set_to_none=False), or no zero_grad after the freezing)",
        ),
        fix=before(place, code, "before every step of the optimizer", model),
        fine=FINE,
    )


RULE = Rule(ID, Level.WRONG, find)
