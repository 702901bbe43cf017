"""``grad-off-over-trainable``: what an optimizer is to train only ever runs with gradients disabled."""

from __future__ import annotations

from collections.abc import Iterator

from frostline.watching.finding import Finding, Level
from frostline.watching.record import Record
from frostline.watching.rules import Rule
from frostline.watching.rules.without_gradient import ungraded, was_off
from frostline.watching.steps import Steps
from frostline.watching.wording import count, freeze, made, modules_of, named, names_of, parts_of

ID = "grad-off-over-trainable"
FINE = "it is not to train: then freeze it, and give the optimizer the rest."


def find(record: Record, steps: Steps) -> Iterator[Finding]:
    """Parameters without any gradient, whose module was called under ``no_grad`` alone."""
    for model, facts, optimizers in ungraded(record, was_off):
        modules = {fact.name: fact for fact in model.modules.values()}
        parts = parts_of(model, facts)
        owners = [modules[name] for name in dict.fromkeys(fact.name.rpartition(".")[0] for fact in facts)]
        calls = max(owner.without_grad for owner in owners)
        place = optimizers[0].place
        yield Finding(
            rule=ID,
            level=Level.WRONG,
            text=f"{named(record, model, parts)} only ran with gradients disabled (torch.no_grad(), inference mode), "
            f"so {' and '.join(map(made, optimizers))} never trains it.",
            place=str(place or ""),
            parameters=names_of(record, model, facts),
            modules=modules_of(record, model, facts),
            evidence=(
                f"{count(calls, 'call')} of {named(record, model, [owners[0].name])} without gradients and none with, "
                "in the steps that were inspected",
                f"{count(len(facts), 'tensor')} ({sum(f.numel for f in facts):,} numbers): .grad was None at all of "
                f"{count(record.num_steps, 'optimizer step')}",
            ),
            fix=freeze(model, parts, place, "if not meant to train; else call it outside of torch.no_grad()"),
            fine=FINE,
        )


RULE = Rule(ID, Level.WRONG, find)
