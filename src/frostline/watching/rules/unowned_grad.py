"""``unowned-grad``: the backward computes gradients that no optimizer uses."""

from __future__ import annotations

from collections.abc import Iterator

from frostline.reports.units import bytes_text, flops_text, share
from frostline.watching.finding import Effect, Figures, Finding, Level
from frostline.watching.record import ModelFact, OptimizerFact, ParameterFact, Record
from frostline.watching.rules import Rule
from frostline.watching.rules.stale_optimizer import stale
from frostline.watching.steps import Steps
from frostline.watching.wording import count, freeze, made, modules_of, named, names_of, parts_of, take_in

ID = "unowned-grad"
FINE = (
    "you use these gradients yourself (they are read, logged, or given to something that is no torch optimizer), or an "
    "optimizer for them comes later in the script."
)


def find(record: Record, steps: Steps) -> Iterator[Finding]:
    """For each model: parameters that got a gradient, that no optimizer ever held, and that nothing else moved.

    The gradient must have come from a backward that an optimizer's parameters were reached by too.
    """
    holders = record.owned
    replaced = {number for each in stale(record) for number in each.new}
    for model in record.models:
        unused = {number: fact for number, fact in model.parameters.items() if fact.is_unused}
        unused = {number: fact for number, fact in unused.items() if number not in replaced}
        passes = [each for each in record.passes if each.accumulates and each.reached & unused.keys()]
        numbers = {n for each in passes for number in each.reached for n in holders.get(number, ())}
        optimizers = [each for each in record.stepped if each.number in numbers]
        if optimizers:
            yield _finding(record, steps, model, list(unused.values()), optimizers)


def _finding(
    record: Record, steps: Steps, model: ModelFact, unused: list[ParameterFact], optimizers: list[OptimizerFact]
) -> Finding:
    numbers = [id(fact.parameter) for fact in unused]
    traced = steps.pass_of(numbers)
    now = None if traced is None else traced.cost()
    fixed = None if traced is None else traced.without(numbers)
    parts = parts_of(model, unused)
    what = named(record, model, parts)
    text = f"the backward computes gradients for {what}, and no optimizer uses them."
    wasted = 0 if now is None or fixed is None else now.backward_flops - fixed.backward_flops
    if now is not None and wasted:
        text = (
            f"{share(wasted, now.backward_flops)} of the backward ({flops_text(wasted)} of "
            f"{flops_text(now.backward_flops)}) is thrown away: it computes gradients for {what}, and no optimizer "
            "uses them."
        )
    place = next((each.place for each in optimizers if each.place is not None), None)
    gradient_bytes = sum(fact.numel * fact.parameter.element_size() for fact in unused)
    kept = [fact for fact in unused if fact.parameter.grad is not None]
    evidence = [
        f"{len(unused)} of {len(model.parameters)} tensors ({sum(f.numel for f in unused):,} numbers, "
        f"{bytes_text(gradient_bytes)} of gradients) require grad and got a gradient; none is in "
        + " or ".join(map(made, optimizers)),
        f"their values are the same bits as at the beginning, after {count(record.num_steps, 'optimizer step')}",
    ]
    if kept and record.num_passes > 1:
        evidence.append(f"{kept[0].name}.grad was never cleared: it is the sum of the steps' gradients")
    return Finding(
        rule=ID,
        level=Level.WASTE,
        text=text,
        place=str(place or ""),
        parameters=names_of(record, model, unused),
        modules=modules_of(record, model, unused),
        evidence=tuple(evidence),
        now=None if now is None else Figures.of(now),
        fixed=None if fixed is None else Figures.of(fixed),
        basis="" if traced is None else traced.basis,
        fix=take_in(model, parts, optimizers[0])
        if all(fact.was_frozen for fact in unused)
        else freeze(model, parts, place),
        fine=FINE,
        effect=Effect(freezes=frozenset(numbers)),
    )


RULE = Rule(ID, Level.WASTE, find)
