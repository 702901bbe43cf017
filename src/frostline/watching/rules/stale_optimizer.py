"""``stale-optimizer``: an optimizer holds the parameters of a module that was replaced."""

from __future__ import annotations

from collections.abc import Iterator

from frostline.subsets.names import listed
from frostline.watching.finding import Finding, Level
from frostline.watching.record import OptimizerFact, ParameterFact, Record
from frostline.watching.rules import Rule
from frostline.watching.steps import Steps
from frostline.watching.wording import before, count, made, modules_of, named, names_of, parts_of, variable

ID = "stale-optimizer"
FINE = "the old parameters are trained elsewhere, and the new ones are not to be."


def find(record: Record, steps: Steps) -> Iterator[Finding]:
    """Optimizers with parameters that no model has, while a model's own of the same shapes are in none."""
    for optimizer, old, new in stale(record):
        for model in record.models:
            facts = [fact for number, fact in model.parameters.items() if number in new]
            if not facts:
                continue
            shapes = listed([str(list(shape)) for shape in old], 3)
            code = (
                f'{optimizer.variable or "optimizer"}.param_groups[0]["params"] = list({variable(model)}.parameters())'
            )
            yield Finding(
                rule=ID,
                level=Level.WRONG,
                text=f"{made(optimizer)} holds parameters that are in no model any more, and not those of "
                f"{named(record, model, parts_of(model, facts))}, which took their place: it never trains.",
                place=str(optimizer.place or ""),
                parameters=names_of(record, model, facts),
                modules=modules_of(record, model, facts),
                evidence=(
                    f"{count(len(old), 'tensor')} of the optimizer's ({shapes}) are in no model that ran, and never "
                    "had a gradient",
                    f"{listed([fact.name for fact in facts], 3)} of the same shapes got a gradient, and no optimizer "
                    "holds them",
                ),
                fix=before(optimizer.step_place, code, "after the module is replaced"),
                fine=FINE,
            )


def stale(record: Record) -> Iterator[tuple[OptimizerFact, list[tuple[int, ...]], set[int]]]:
    """Optimizers with the shapes of what they hold in vain, and the parameters, by id, that took its place."""
    known = {number for model in record.models for number in model.parameters}
    free: dict[tuple[int, ...], list[ParameterFact]] = {}
    for _, fact in record.facts():
        if fact.got_gradient and fact.was_trainable and not fact.owners and not fact.moved:
            free.setdefault(tuple(fact.parameter.shape), []).append(fact)
    for optimizer in record.stepped:
        lost = [p for p in optimizer.parameters() if id(p) not in known and id(p) not in record.stray]
        pairs = [(p, free[tuple(p.shape)]) for p in lost if tuple(p.shape) in free]
        if lost and len(pairs) == len(lost):
            new = {id(fact.parameter) for _, facts in pairs for fact in facts}
            yield optimizer, [tuple(p.shape) for p in lost], new


RULE = Rule(ID, Level.WRONG, find)
