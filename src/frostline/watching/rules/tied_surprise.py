"""``tied-surprise``: a head is trained alone, and is tied to an embedding at the other end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

from torch import nn

from frostline.reports.units import share
from frostline.subsets.kinds import is_embedding_module
from frostline.watching.finding import Effect, Figures, Finding, Level
from frostline.watching.places import expression
from frostline.watching.record import ModelFact, ParameterFact, Record
from frostline.watching.rules import Rule
from frostline.watching.rules.early_param_forces_backward import MOSTLY_FROZEN, WORTH
from frostline.watching.steps import Steps, TracedPass
from frostline.watching.wording import before, called, optimizers_of

ID = "tied-surprise"
FINE = "embedding and head are meant to train together."


def find(record: Record, steps: Steps) -> Iterator[Finding]:
    """A trained weight with two names, one of an embedding, in a network of which the most else is frozen."""
    usual = steps.usual()
    now = None if usual is None else usual.cost()
    if usual is None or now is None or len(usual.fact.replay.models) > 1:  # type: ignore[union-attr]
        return
    for model in record.models:
        for fact in model.parameters.values():
            head = _head(model, fact)
            if not head or usual.names.get(id(fact.parameter)) not in usual.now or not fact.owners:
                continue
            if _others_trained(model, fact) > 1 - MOSTLY_FROZEN:
                continue
            effect = Effect(frozenset([id(fact.parameter)]), (head,), partial(_untied, model, head))
            fixed = steps.otherwise(usual, [effect])
            if fixed is not None and now.step_flops - fixed.step_flops >= WORTH * now.step_flops:
                yield _finding(record, model, fact, head, usual, Figures.of(now), fixed, effect)


def _head(model: ModelFact, fact: ParameterFact) -> str:
    """The name under which no embedding has it; '' if it is not tied to one."""
    names = (fact.name, *fact.aliases)
    modules = {each.name: each.module for each in model.modules.values()}
    is_embedding = {
        name: is_embedding_module(modules[name.rpartition(".")[0]]) for name in names if _owned(name, modules)
    }
    heads = [name for name, embedding in is_embedding.items() if not embedding]
    return heads[0] if heads and len(heads) < len(is_embedding) else ""


def _owned(name: str, modules: dict[str, nn.Module]) -> bool:
    return name.rpartition(".")[0] in modules


def _others_trained(model: ModelFact, tied: ParameterFact) -> float:
    """The share of the other numbers that trains."""
    others = [fact for fact in model.parameters.values() if fact is not tied]
    total = sum(fact.numel for fact in others)
    return sum(fact.numel for fact in others if fact.was_trainable) / total if total else 1.0


@contextlib.contextmanager
def _untied(model: ModelFact, head: str) -> Iterator[None]:
    """The head with a Parameter of its own on the same memory."""
    owner = model.module.get_submodule(head.rpartition(".")[0])
    own = head.rpartition(".")[2]
    tied = owner._parameters[own]
    assert tied is not None
    owner._parameters[own] = nn.Parameter(tied.detach())
    try:
        yield
    finally:
        owner._parameters[own] = tied


def _finding(
    record: Record,
    model: ModelFact,
    fact: ParameterFact,
    head: str,
    usual: TracedPass,
    now: Figures,
    fixed: Figures,
    effect: Effect,
) -> Finding:
    optimizers = optimizers_of(record, [fact])
    place = optimizers[0].place if optimizers else None
    embedding = next(name for name in (fact.name, *fact.aliases) if name != head)
    written = expression(model.module, called(model, place), head)
    other = expression(model.module, called(model, place), embedding)
    saved = now.step_flops - fixed.step_flops
    return Finding(
        rule=ID,
        level=Level.WASTE,
        text=f"{record.spelled(model, head)} trains and is tied to {record.spelled(model, embedding)}, so backward "
        f"goes all the way to the embedding: {share(saved, now.step_flops)} of the step.",
        place=str(place or ""),
        parameters=(record.spelled(model, fact.name),),
        modules=tuple(record.spelled(model, name.rpartition(".")[0]) for name in (embedding, head)),
        evidence=(
            f"one tensor under {1 + len(fact.aliases)} names, {fact.numel:,} numbers; backward is "
            f"{now.backward_flops:,} FLOPs, {fixed.backward_flops:,} with a head of its own and the embedding frozen",
        ),
        now=now,
        fixed=fixed,
        basis=usual.basis,
        fix=before(
            place,
            f"{written} = torch.nn.Parameter({written}.detach().clone())\n{other}.requires_grad_(False)",
            "before the optimizer is made",
            model,
        ),
        fine=FINE,
        effect=effect,
    )


RULE = Rule(ID, Level.WASTE, find)
