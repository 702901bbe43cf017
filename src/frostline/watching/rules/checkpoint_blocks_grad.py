"""``checkpoint-blocks-grad``: a reentrant checkpoint lets no gradient through to the parameters inside it."""

from __future__ import annotations

import linecache
from collections.abc import Iterator

from frostline.watching.finding import Finding, Fix, Level
from frostline.watching.places import Place
from frostline.watching.record import Record
from frostline.watching.rules import Rule
from frostline.watching.rules.without_gradient import ungraded, was_cut
from frostline.watching.steps import Steps
from frostline.watching.wording import count, made, modules_of, named, names_of, parts_of

ID = "checkpoint-blocks-grad"
FINE = "what is inside is not to train: then freeze it."


def find(record: Record, steps: Steps) -> Iterator[Finding]:
    """Parameters without any gradient, whose module ran in reentrant checkpoints of which no input requires grad."""
    for model, facts, optimizers in ungraded(record, was_cut):
        modules = {fact.name: fact for fact in model.modules.values()}
        owners = [modules[name] for name in dict.fromkeys(fact.name.rpartition(".")[0] for fact in facts)]
        calls = max(owner.checkpointed for owner in owners)
        place = next(iter(record.checkpoint_places), None)
        yield Finding(
            rule=ID,
            level=Level.WRONG,
            text=f"{named(record, model, parts_of(model, facts))} runs inside a reentrant checkpoint none of whose "
            f"inputs requires grad: no gradient reaches it, and {' and '.join(map(made, optimizers))} never trains it.",
            place=str(place or ""),
            parameters=names_of(record, model, facts),
            modules=modules_of(record, model, facts),
            evidence=(
                f"{count(calls, 'call')} of {named(record, model, [owners[0].name])} inside such checkpoints, none "
                "outside, in the steps that were inspected",
                f"{count(len(facts), 'tensor')} ({sum(f.numel for f in facts):,} numbers): .grad was None at all of "
                f"{count(record.num_steps, 'optimizer step')}",
            ),
            fix=_fix(place),
            fine=FINE,
        )


def _fix(place: Place | None) -> Fix:
    code = "use_reentrant=False"
    if place is None:
        return Fix(code, "in every call of torch.utils.checkpoint.checkpoint")
    written = "use_reentrant=True"
    if written in linecache.getline(place.path, place.line):
        return Fix(code, f"in place of {written} at {place}", place.path, place.line, written)
    return Fix(code, f"as an argument of checkpoint at {place}")


RULE = Rule(ID, Level.WRONG, find)
