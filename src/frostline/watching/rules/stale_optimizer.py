"""``stale-optimizer``: an optimizer holds the parameters of a module that was replaced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from frostline.subsets.names import listed, prefixes, within
from frostline.watching.finding import Finding, Level
from frostline.watching.places import expression
from frostline.watching.record import ModelFact, OptimizerFact, ParameterFact, Record
from frostline.watching.rules import Rule
from frostline.watching.steps import Steps
from frostline.watching.wording import before, called, count, made, modules_of, named, names_of, parts_of

ID = "stale-optimizer"
FINE = "the old parameters are trained elsewhere, and the new ones are not to be."


@dataclass(frozen=True)
class Stale:
    """An optimizer that holds parameters in vain.

    Attributes:
        lost: their group, their position in it and their shape.
        new: ids of the parameters that took their place.
        swaps: group and position -> which of these stands there by its shape, in the models' order.
    """

    optimizer: OptimizerFact
    lost: list[tuple[int, int, tuple[int, ...]]]
    new: set[int]
    swaps: dict[tuple[int, int], ParameterFact]


def find(record: Record, steps: Steps) -> Iterator[Finding]:
    """Optimizers with parameters that no model has, while a model's own of the same shapes are in none."""
    for each in stale(record):
        for model in record.models:
            facts = [fact for number, fact in model.parameters.items() if number in each.new]
            if facts:
                yield _finding(record, model, facts, each)


def _finding(record: Record, model: ModelFact, facts: list[ParameterFact], found: Stale) -> Finding:
    optimizer = found.optimizer
    shapes = listed([str(list(shape)) for _, _, shape in found.lost], 3)
    return Finding(
        rule=ID,
        level=Level.WRONG,
        text=f"{made(optimizer)} holds parameters that are in no model any more, and not those of "
        f"{named(record, model, parts_of(model, facts))}, which took their place: it never trains.",
        place=str(optimizer.place or ""),
        parameters=names_of(record, model, facts),
        modules=modules_of(record, model, facts),
        evidence=(
            f"{count(len(found.lost), 'tensor')} of the optimizer's ({shapes}) are in no model that ran, and never had "
            "a gradient",
            f"{listed([fact.name for fact in facts], 3)} of the same shapes got a gradient, and no optimizer holds "
            "them",
        ),
        fix=before(optimizer.step_place, _code(model, found), "after the module is replaced", model, optimizer),
        fine=FINE,
    )


def _code(model: ModelFact, found: Stale) -> str:
    """Lines that put the new parameters where the lost ones are, each in its own group."""
    place = found.optimizer.step_place
    groups = f"{called(found.optimizer, place)}.param_groups"
    lines = []
    for group, start, facts in _runs(model, found.swaps):
        end = start + len(facts)
        new = ", ".join(_written(model, called(model, place), [fact.name for fact in facts]))
        lines.append(f'{groups}[{group}]["params"][{start}:{end}] = [{new}]')
    return "\n".join(lines)


def _runs(
    model: ModelFact, swaps: dict[tuple[int, int], ParameterFact]
) -> Iterator[tuple[int, int, list[ParameterFact]]]:
    """What stands one after the other in a group: the group, the first position, and the new parameters."""
    own = {at: fact for at, fact in sorted(swaps.items()) if id(fact.parameter) in model.parameters}
    for group, start in own:
        if (group, start - 1) not in own:
            facts: list[ParameterFact] = []
            while (group, start + len(facts)) in own:
                facts.append(own[group, start + len(facts)])
            yield group, start, facts


def _written(model: ModelFact, variable: str, names: list[str]) -> Iterator[str]:
    """How code writes these parameters in this order: the largest modules as a whole."""
    while names:
        wholes = {
            part: [fact.name for fact in model.parameters.values() if within(fact.name, part)]
            for part in ("", *prefixes(names[0]))
        }
        whole = next(
            (part for part, inside in wholes.items() if len(inside) > 1 and inside == names[: len(inside)]), None
        )
        written = expression(model.module, variable, names[0] if whole is None else whole)
        yield written if whole is None else f"*{written}.parameters()"
        names = names[1 if whole is None else len(wholes[whole]) :]


def stale(record: Record) -> Iterator[Stale]:
    """Optimizers with what they hold in vain, and what took its place and still has it."""
    known = {number for model in record.models for number in model.parameters}
    free: dict[tuple[int, ...], list[ParameterFact]] = {}
    for model in record.models:
        replaced = model.replaced
        for number, fact in model.parameters.items():
            if fact.is_unused and number not in replaced:
                free.setdefault(tuple(fact.parameter.shape), []).append(fact)
    for optimizer in record.stepped:
        lost = [
            (group, position, tuple(parameter.shape))
            for group, held in enumerate(optimizer.param_groups)
            for position, parameter in enumerate(held["params"])
            if id(parameter) not in known and id(parameter) not in record.stray
        ]
        if lost and all(shape in free for _, _, shape in lost):
            new = {id(fact.parameter) for _, _, shape in lost for fact in free[shape]}
            left = {shape: iter(facts) for shape, facts in free.items()}
            swaps = {(group, at): took for group, at, shape in lost if (took := next(left[shape], None)) is not None}
            yield Stale(optimizer, lost, new, swaps)


RULE = Rule(ID, Level.WRONG, find)
