"""``early-param-forces-backward``: a few early parameters make the gradient travel the whole way."""

from __future__ import annotations

from collections.abc import Iterator

from frostline.costing.marginal import Change, early_parameters
from frostline.reports.units import share
from frostline.watching.finding import Effect, Figures, Finding, Level
from frostline.watching.record import ModelFact, Record
from frostline.watching.rules import Rule
from frostline.watching.steps import Steps, TracedPass
from frostline.watching.wording import freeze, modules_of, named, names_of, optimizers_of, parts_of

ID = "early-param-forces-backward"
FINE = "these parameters are worth their price: for the task, they matter more than their number says."
WORTH = 0.2
"""Of the step: freezing them saves at least so much."""
MOSTLY_FROZEN = 0.5
"""Of the numbers: where most of the network trains, the backward goes all the way for them too."""


def find(record: Record, steps: Steps) -> Iterator[Finding]:
    """A twentieth of what trains, at most, that costs a fifth of the step, at least, in a network mostly frozen."""
    usual = steps.usual()
    if usual is None or usual.trace.entangled:
        return
    unused = {number for model in record.models for number, fact in model.parameters.items() if fact.is_unused}
    names = [name for number, name in usual.names.items() if name in usual.now and number not in unused]
    numbers = sum(usual.trace.parameters[name].numel() for name in names)
    total = sum(fact.numel for model in _with_any(record, usual, names) for fact in model.parameters.values())
    cost = usual.cost(names)
    if cost is None or numbers > (1 - MOSTLY_FROZEN) * total:
        return
    change = early_parameters(cost)
    if change is not None and change.step_flops >= WORTH * cost.step_flops:
        yield from _findings(record, usual, change, unused)


def _with_any(record: Record, usual: TracedPass, names: list[str]) -> list[ModelFact]:
    """The models in which any of these trains: a teacher beside them is no part of a network that is mostly frozen."""
    return [each for each in record.models if any(usual.names.get(number) in names for number in each.parameters)]


def _findings(record: Record, usual: TracedPass, change: Change, unused: set[int]) -> Iterator[Finding]:
    numbers = {number for number, name in usual.names.items() if name in change.names}
    now, fixed = usual.without(unused), usual.without(unused | numbers)
    for model in record.models:
        facts = [fact for number, fact in model.parameters.items() if number in numbers]
        if facts and now is not None and fixed is not None:
            yield _finding(record, model, usual, change, numbers, Figures.of(now), Figures.of(fixed))


def _finding(
    record: Record,
    model: ModelFact,
    usual: TracedPass,
    change: Change,
    numbers: set[int],
    now: Figures,
    fixed: Figures,
) -> Finding:
    facts = [fact for number, fact in model.parameters.items() if number in numbers]
    parts = parts_of(model, facts)
    optimizers = optimizers_of(record, facts)
    place = optimizers[0].place if optimizers else None
    saved = now.step_flops - fixed.step_flops
    trained = sum(usual.trace.parameters[name].numel() for name in usual.now)
    return Finding(
        rule=ID,
        level=Level.WASTE,
        text=f"{named(record, model, parts)}, {change.num_elements:,} of the {trained:,} numbers that train, "
        f"{'are' if len(parts) > 1 else 'is'} used so early that backward goes through the frozen network for them: "
        f"{share(saved, now.step_flops)} of the step.",
        place=str(place or ""),
        parameters=names_of(record, model, facts),
        modules=modules_of(record, model, facts),
        evidence=(
            f"without them backward is {fixed.backward_flops:,} FLOPs instead of {now.backward_flops:,}, and "
            f"{fixed.saved_bytes:,} bytes are saved instead of {now.saved_bytes:,}",
        ),
        now=now,
        fixed=fixed,
        basis=usual.basis,
        fix=freeze(model, parts, place),
        fine=FINE,
        effect=Effect(freezes=frozenset(numbers)),
    )


RULE = Rule(ID, Level.WASTE, find)
