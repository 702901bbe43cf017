"""``ranks-differ``: processes that train together end with parameters that are not the same."""

from __future__ import annotations

from collections.abc import Iterator

from frostline.watching.finding import Finding, Fix, Level
from frostline.watching.places import Place
from frostline.watching.record import ApartFact, ModelFact, Record, WrapFact
from frostline.watching.rules import Rule
from frostline.watching.steps import Steps
from frostline.watching.wording import before, called, count, named, names_of, parts_of

ID = "ranks-differ"
FINE = "each rank trains a network of its own, or they are averaged later."


def find(record: Record, steps: Steps) -> Iterator[Finding]:
    """Parameters that were the same on all ranks, or that ``DistributedDataParallel`` holds, and are so no more."""
    for model in record.models:
        wrap = next((record.wraps[number] for number in model.modules if number in record.wraps), None)
        apart = [
            fact
            for fact in record.apart
            if fact.parameter in model.parameters and (fact.began_together or wrap is not None)
        ]
        if apart and record.num_steps:
            yield _finding(record, model, wrap, apart)


def _finding(record: Record, model: ModelFact, wrap: WrapFact | None, apart: list[ApartFact]) -> Finding:
    facts = [model.parameters[each.parameter] for each in apart]
    ranks = sorted({rank for each in apart for rank in each.ranks})
    first = apart[0]
    place, fix = _way_out(record, model, wrap, apart)
    same = len(model.parameters) - len(apart)
    evidence = [
        f"{count(len(apart), 'tensor')} {'is' if len(apart) == 1 else 'are'} not the same bits on rank 0 and on rank "
        f"{', '.join(map(str, ranks))}; {'no other one is' if not same else f'{same} are'}",
        f"{facts[0].name} has norm {first.norm:.9g} on rank 0 and {first.other_norm:.9g} on rank {first.ranks[0]}",
    ]
    if wrap is None:
        evidence.append("no DistributedDataParallel is around it")
    elif _left_out(wrap, apart):
        evidence.append("DistributedDataParallel was made while these required no grad, so it exchanges none of theirs")
    return Finding(
        rule=ID,
        level=Level.WRONG,
        text=f"{named(record, model, parts_of(model, facts))} ended with other values on other ranks: they train "
        "networks of their own.",
        place=str(place or ""),
        parameters=names_of(record, model, facts),
        modules=(),
        evidence=tuple(evidence),
        fix=fix,
        fine=FINE,
    )


def _left_out(wrap: WrapFact, apart: list[ApartFact]) -> bool:
    return all(each.parameter not in wrap.exchanged for each in apart)


def _way_out(
    record: Record, model: ModelFact, wrap: WrapFact | None, apart: list[ApartFact]
) -> tuple[Place | None, Fix]:
    if wrap is None:
        optimizer = next(iter(record.stepped), None)
        place = None if optimizer is None else optimizer.place
        name = called(model, place)
        code = f"{name} = torch.nn.parallel.DistributedDataParallel({name})"
        return place, before(place, code, "before the training begins", model)
    if _left_out(wrap, apart):
        parts = [model.parameters[each.parameter] for each in apart]
        code = "".join(f"# {fact.name}: requires_grad_(True)\n" for fact in parts[:4])
        return wrap.place, before(wrap.place, f"{code}# ... before this line, or wrap it again once they train", "")
    name = called(model, wrap.place)
    code = f"for parameter in {name}.parameters():\n    torch.distributed.broadcast(parameter.data, 0)"
    return wrap.place, Fix(code, "where the ranks are to be the same again (and find what moves them apart)")


RULE = Rule(ID, Level.WRONG, find)
