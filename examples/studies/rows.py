"""The rows of a study: which parameters train.

Plans need `frostline.plan`, and the peers' dynamic program `benchmarks.peers`; without them their rows are left out,
and the study says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from itertools import pairwise

import torch
from torch import nn

import frostline as fl
from examples.studies.task import Task
from frostline.subsets import resolve

KINDS = ("gradient_norm", "relative_gradient_norm", "taylor", "gradient_l1")


class UnavailableError(Exception):
    """A row cannot be run here, and why."""


class Costs:
    """A model's trace, and importance by kind and seed: what plans and predictions are made from."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        self.task = task
        self.model = model

    @cached_property
    def trace(self) -> fl.Trace:
        batch = next(self.task.batches(self.task.examples(0), torch.Generator().manual_seed(0)))
        traced = fl.trace(self.model, step=lambda model: self.task.loss(model, batch))
        traced.calibrate()
        return traced

    def importance(self, kind: str, seed: int) -> fl.Importance:
        """From one epoch of what the seed adapts with."""
        batches = self.task.batches(self.task.examples(seed), torch.Generator().manual_seed(seed))
        return fl.importance(self.task.fresh(seed), batches, kind=kind, step=self.task.loss)  # type: ignore[arg-type]

    def seconds(self, names: list[str]) -> float:
        """Of a step, predicted."""
        seconds = self.trace.cost(names, method="train-only").step_seconds
        assert seconds is not None
        return seconds

    @cached_property
    def full_seconds(self) -> float:
        """Of a step that trains everything, predicted."""
        return self.seconds(list(resolve("@all", self.model).names))


@dataclass(frozen=True)
class Row:
    """One way to choose what trains.

    Attributes:
        family: what it is drawn as.
        choose: names of the parameters, from the costs of the fresh model and a seed; None: the adapters of LoRA.
    """

    label: str
    family: str
    choose: Callable[[Costs, int], list[str]] | None


def rows(task: Task) -> dict[str, Row]:
    """Every row of a study by its label."""
    fixed = [
        ("everything", "everything", "@all"),
        ("head only", "last blocks", "@head"),
        *((label, "last blocks", pattern) for label, pattern in task.last.items()),
        ("all biases", "biases", "@biases"),
        ("norms", "norms", "@norms"),
    ]
    found = [Row(label, family, _pattern(pattern)) for label, family, pattern in fixed]
    found.append(Row("LoRA", "LoRA", None))
    for share in task.shares:
        found += [Row(f"peers' program {share} %, {kind}", "peers", _peer(share, kind)) for kind in KINDS[:1]]
    for share in task.shares:
        found += [Row(f"plan {share} %, {kind}", f"plan, {kind}", _plan(share, kind)) for kind in KINDS]
    share, (label, last) = task.shares[0], next(iter(task.last.items()))
    always = _pattern(last)
    found += [
        Row(f"plan {share} % with {label}, {kind}", f"plan, {kind}", _plan(share, kind, always)) for kind in KINDS[-3:]
    ]
    return {row.label: row for row in found}


def _pattern(pattern: str | list[str]) -> Callable[[Costs, int], list[str]]:
    return lambda costs, seed: list(resolve(pattern, costs.model).names)


def _plan(
    share: int, kind: str, always: Callable[[Costs, int], list[str]] = lambda costs, seed: []
) -> Callable[[Costs, int], list[str]]:
    def choose(costs: Costs, seed: int) -> list[str]:
        plan = getattr(fl, "plan", None)
        if plan is None:
            raise UnavailableError("this frostline has no fl.plan")
        limit = share / 100 * costs.full_seconds
        try:
            found = plan(
                costs.trace, {"step_seconds": limit}, costs.importance(kind, seed), always=always(costs, seed),
                method="train-only",
            )  # fmt: skip
        except fl.FrostlineError as error:  # such as a budget that nothing meets
            raise UnavailableError(str(error)) from error
        return list(found.subset.names)

    return choose


def _peer(share: int, kind: str) -> Callable[[Costs, int], list[str]]:
    """What ElasticTrainer and GreenTrainer would choose: `benchmarks.peers` on the tensors as a chain.

    The chain is in the reverse order of ``named_parameters()``, as theirs. Its seconds come from the same costs as a
    plan's: training the last k tensors and training the k-th alone tell what each takes by itself and what it takes to
    pass the gradient by. Where the network is no chain, the time that it really takes is another than they think.
    """

    def choose(costs: Costs, seed: int) -> list[str]:
        try:
            peers = import_module("benchmarks.peers")
        except ImportError as error:
            raise UnavailableError("there is no benchmarks.peers") from error
        names = list(resolve("@all", costs.model).names)[::-1]
        alone = [costs.seconds([name]) for name in names]
        together = [costs.seconds(names[: k + 1]) for k in range(len(names))]
        owned = [max(0.0, after - single) for after, single in zip(together[1:], alone[1:], strict=True)]
        own = [max(0.0, b - a) for a, b in pairwise([0.0, *owned])]
        own.append(max(0.0, together[-1] - together[-2]))
        forward = alone[0] - own[0]
        reach = [max(0.0, single - forward - each) for single, each in zip(alone, own, strict=True)]
        passing = [max(0.0, b - a) for a, b in pairwise(reach)] + [0.0]
        scores = costs.importance(kind, seed).scores
        chain, kept = peers.Chain(passing, own, [scores[name] for name in names]).quantised()
        room = (share / 100 * costs.full_seconds - forward) / (costs.full_seconds - forward)
        if room <= 0:
            raise UnavailableError(f"the forward alone takes {100 * forward / costs.full_seconds:.0f} % of a full step")
        chosen = peers.chosen_by_chain(chain, int(room * kept * peers.STEPS))
        if not chosen:
            raise UnavailableError("it finds nothing within the budget")
        return [names[place] for place in chosen]

    return choose


def adapters(model: nn.Module) -> list[str]:
    """What peft lets train."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
