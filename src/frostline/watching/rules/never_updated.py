"""``never-updated``: an optimizer holds parameters that never get a gradient."""

from __future__ import annotations

from collections.abc import Iterator

from frostline.watching.finding import Finding, Level
from frostline.watching.record import ModelFact, OptimizerFact, ParameterFact, Record
from frostline.watching.rules import Rule
from frostline.watching.rules.without_gradient import LONG, may_be_routed, ungraded, was_cut, was_off
from frostline.watching.steps import Steps
from frostline.watching.wording import count, freeze, made, modules_of, named, names_of, parts_of

ID = "never-updated"
FEWEST = 3
"""Steps before a part that is not called counts as left out: tasks may take turns."""
FINE = "the loss is not to use them (a spare head), or they have their turn later: then freeze them until it comes."


def find(record: Record, steps: Steps) -> Iterator[Finding]:
    """Those that neither ``checkpoint-blocks-grad`` nor ``grad-off-over-trainable`` explains."""
    for model, facts, optimizers in ungraded(record, lambda module: not was_cut(module) and not was_off(module)):
        if max(each.steps for each in optimizers) < FEWEST:
            continue
        called = _called(model)
        routed = record.num_steps < LONG
        left = [f for f in facts if f.name.rpartition(".")[0] in called or not (routed and may_be_routed(model, f))]
        if left:
            yield _finding(record, model, left, optimizers, called)


def _called(model: ModelFact) -> set[str]:
    return {fact.name for fact in model.modules.values() if fact.with_grad}


def _finding(
    record: Record, model: ModelFact, facts: list[ParameterFact], optimizers: list[OptimizerFact], called: set[str]
) -> Finding:
    parts = parts_of(model, facts)
    ran = [fact for fact in facts if fact.name.rpartition(".")[0] in called]
    place = optimizers[0].place
    evidence = [
        f"{count(len(facts), 'tensor')} ({sum(fact.numel for fact in facts):,} numbers): .grad was None at all of "
        f"{count(record.num_steps, 'optimizer step')}, and their values are the same bits as at the beginning",
    ]
    if ran:
        where = named(record, model, list(dict.fromkeys(fact.name.rpartition(".")[0] for fact in ran)))
        evidence.append(f"{where} ran with gradients enabled: what it returns is detached, or not used by the loss")
    if len(ran) < len(facts):
        names = [fact.name for fact in facts if fact not in ran]
        where = named(record, model, list(dict.fromkeys(name.rpartition(".")[0] or name for name in names)))
        evidence.append(f"{where} was not called in the steps that were inspected")
    return Finding(
        rule=ID,
        level=Level.WRONG,
        text=f"{named(record, model, parts)} never got a gradient, though {' and '.join(map(made, optimizers))} "
        "is to train it.",
        place=str(place or ""),
        parameters=names_of(record, model, facts),
        modules=modules_of(record, model, facts),
        evidence=tuple(evidence),
        fix=freeze(model, parts, place, "if not meant to train; else use its output in the loss, undetached"),
        fine=FINE,
    )


RULE = Rule(ID, Level.WRONG, find)
