"""``stochastic-frozen``: dropout is on in a part that is frozen."""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn.modules.dropout import _DropoutNd

from frostline.subsets.names import within
from frostline.watching.finding import Finding, Level
from frostline.watching.record import ModelFact, Record
from frostline.watching.rules import Rule
from frostline.watching.steps import Steps
from frostline.watching.wording import named, set_eval

ID = "stochastic-frozen"
WORTH = 0.25
"""Of the forward: what comes before all that trains, at least."""
FINE = "the noise is meant as augmentation of the features."


def find(record: Record, steps: Steps) -> Iterator[Finding]:
    """Dropout in train mode, in a module of which no parameter trains and before which nothing trains.

    What comes before anything that trains must be a part of the forward that is worth a word.
    """
    usual = steps.usual()
    now = None if usual is None else usual.cost()
    prefix = None if usual is None else usual.prefix_flops()
    if usual is None or now is None or prefix is None or prefix < WORTH * now.forward_flops:
        return
    for model in record.models:
        facts = model.parameters.values()
        if not any(fact.owners and fact.got_gradient for fact in facts):
            continue
        trains = [fact.name for fact in facts if fact.was_trainable]
        drops = [
            fact.name
            for fact in model.modules.values()
            if isinstance(fact.module, _DropoutNd) and fact.module.p > 0 and fact.training and not fact.from_trained
        ]
        frozen = [(name, part) for name in drops if (part := _frozen_around(model, name, trains))]
        if frozen:
            yield _finding(record, model, [name for name, _ in frozen], list(dict.fromkeys(p for _, p in frozen)))


def _frozen_around(model: ModelFact, name: str, trains: list[str]) -> str:
    """The largest module around a dropout with parameters of which none trains; '' if there is none."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        part = ".".join(parts[:length])
        if any(within(fact.name, part) for fact in model.parameters.values()) and not any(
            within(each, part) for each in trains
        ):
            return part
    return ""


def _finding(record: Record, model: ModelFact, drops: list[str], parts: list[str]) -> Finding:
    first = model.module.get_submodule(drops[0])
    return Finding(
        rule=ID,
        level=Level.INFO,
        text=f"dropout is on in {named(record, model, parts)}, which is frozen: what it computes for one sample is "
        "another thing each time, and cannot be kept.",
        place=str(model.place or ""),
        parameters=(),
        modules=tuple(record.spelled(model, name) for name in drops),
        evidence=(f"{len(drops)} dropout modules in train mode, the first with p = {getattr(first, 'p', 0):g}",),
        fix=set_eval(model, parts, model.place),
        fine=FINE,
    )


RULE = Rule(ID, Level.INFO, find)
