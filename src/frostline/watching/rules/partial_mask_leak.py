"""``partial-mask-leak``: rows that a gradient hook masks move all the same."""

from __future__ import annotations

from collections.abc import Iterator

from frostline.watching.finding import Finding, Level
from frostline.watching.record import LeakFact, ModelFact, Record
from frostline.watching.rules import Rule
from frostline.watching.steps import Steps
from frostline.watching.wording import before, called, made

ID = "partial-mask-leak"
FINE = "the masked rows are meant to decay."


def find(record: Record, steps: Steps) -> Iterator[Finding]:
    """Rows with a gradient that a hook set to zero, and that an optimizer's step changed."""
    for model in record.models:
        for number in model.parameters:
            leaks = [leak for leak in record.leaks if leak.parameter == number]
            if leaks:
                yield _finding(record, model, max(leaks, key=lambda leak: leak.moved))


def _finding(record: Record, model: ModelFact, leak: LeakFact) -> Finding:
    fact = model.parameters[leak.parameter]
    name = record.spelled(model, fact.name)
    optimizer = record.optimizers[leak.optimizer]
    place = optimizer.step_place if leak.weight_decay else None
    name_there = called(optimizer, place)
    if leak.weight_decay:
        why = f"weight decay ({leak.weight_decay:g})"
        code = f'for group in {name_there}.param_groups:\n    group["weight_decay"] = 0.0'
    else:
        why = "momentum of steps before the mask"
        code = f"{name_there}.state.clear()  # once, when the mask is set"
    size = fact.parameter[0].numel()
    return Finding(
        rule=ID,
        level=Level.WRONG,
        text=f"a hook sets the gradient of rows of {name} to zero, and {made(optimizer)} moves them all the same, by "
        f"{why}.",
        place=str(optimizer.place or ""),
        parameters=(name,),
        modules=(name.rpartition(".")[0],),
        evidence=(
            f"{leak.moved:,} of {leak.masked:,} masked rows moved in one step, by up to {leak.most:.3g}",
            f"the gradient is dense, {leak.rows * size:,} numbers, and so is the optimizer's state, where "
            f"{(leak.rows - leak.masked) * size:,} are wanted",
        ),
        fix=before(place, code, "where the mask is set", optimizer),
        fine=FINE,
    )


RULE = Rule(ID, Level.WRONG, find)
