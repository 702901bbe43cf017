"""What three rules share: parameters that an optimizer holds and steps, and that never got a gradient."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from torch import nn

from frostline.subsets.names import prefixes, within
from frostline.watching.record import ModelFact, ModuleFact, OptimizerFact, ParameterFact, Record
from frostline.watching.wording import optimizers_of

LONG = 50
"""Steps after which an expert that was never chosen is no coincidence any more."""


def ungraded(record: Record, is_meant: Callable[[ModuleFact | None], bool]) -> Iterator[
    tuple[ModelFact, list[ParameterFact], list[OptimizerFact]]
]:  # fmt: skip
    """For each model: trainable parameters that optimizers step and that never got a gradient.

    Not those that moved: without a gradient an optimizer moves nothing, so other code trains them (a mean teacher). Nor
    those that another took the place of. ``is_meant``: asked of the module that owns each.
    """
    for model in record.models:
        modules = {fact.name: fact for fact in model.modules.values()}
        replaced = model.replaced
        facts = [
            fact
            for fact in model.parameters.values()
            if fact.owners
            and fact.was_trainable
            and not fact.was_frozen
            and not fact.got_gradient
            and not fact.moved
            and id(fact.parameter) not in replaced
            and is_meant(modules.get(fact.name.rpartition(".")[0]))
        ]
        optimizers = optimizers_of(record, facts)
        if facts and optimizers:
            yield model, facts, optimizers


def was_cut(module: ModuleFact | None) -> bool:
    """Whether a module ran in reentrant checkpoints that no gradient comes out of, and nowhere else."""
    return module is not None and module.checkpointed > 0 and not module.with_grad


def was_off(module: ModuleFact | None) -> bool:
    """Whether a module only ran with gradients disabled."""
    return module is not None and module.without_grad > 0 and not module.with_grad and not module.checkpointed


def may_be_routed(model: ModelFact, fact: ParameterFact) -> bool:
    """Whether its turn may come: it has a twin in a numbered list that did get a gradient (an expert, say), or it lies
    in a ``ModuleDict`` in which something else did (a task's head).
    """
    modules = {each.name: each.module for each in model.modules.values()}
    for around in prefixes(fact.name):
        if isinstance(modules.get(around), nn.ModuleDict):
            return any(other.got_gradient and within(other.name, around) for other in model.parameters.values())
    for match in re.finditer(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", fact.name):
        pattern = re.compile(re.escape(fact.name[: match.start()]) + r"\d+" + re.escape(fact.name[match.end() :]))
        for other in model.parameters.values():
            if other.got_gradient and pattern.fullmatch(other.name) and other.parameter.shape == fact.parameter.shape:
                return True
    return False
