"""The rows of a study: which parameters train.

Plans need `frostline.plan`, and the peers' dynamic program `benchmarks.planning`; without them their rows are left out,
and the study says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from torch import nn

import frostline as fl
from examples.studies.task import Task
from frostline.subsets import resolve

KINDS = ("gradient_norm", "relative_gradient_norm", "taylor")
SHARES = (50, 35)
PEER = "benchmarks.planning:dynamic_program"


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
        *((f"last {k}", "last blocks", f"@last:{k}") for k in task.num_last),
        ("all biases", "biases", "@biases"),
        ("norms", "norms", "@norms"),
    ]
    found = [Row(label, family, _pattern(pattern)) for label, family, pattern in fixed]
    found.append(Row("LoRA", "LoRA", None))
    for share in SHARES:
        found += [Row(f"peers' program {share} %, {kind}", "peers", _peer(share, kind)) for kind in KINDS[:1]]
    for share in SHARES:
        found += [Row(f"plan {share} %, {kind}", f"plan, {kind}", _plan(share, kind)) for kind in KINDS]
    return {row.label: row for row in found}


def _pattern(pattern: str) -> Callable[[Costs, int], list[str]]:
    return lambda costs, seed: list(resolve(pattern, costs.model).names)


def _plan(share: int, kind: str) -> Callable[[Costs, int], list[str]]:
    def choose(costs: Costs, seed: int) -> list[str]:
        plan = getattr(fl, "plan", None)
        if plan is None:
            raise UnavailableError("this frostline has no fl.plan")
        limit = share / 100 * costs.full_seconds
        try:
            found = plan(costs.trace, {"step_seconds": limit}, costs.importance(kind, seed), method="train-only")
        except fl.FrostlineError as error:  # such as a budget that nothing meets
            raise UnavailableError(str(error)) from error
        return list(found.subset.names)

    return choose


def _peer(share: int, kind: str) -> Callable[[Costs, int], list[str]]:
    def choose(costs: Costs, seed: int) -> list[str]:
        module, _, function = PEER.partition(":")
        try:
            program: Callable[[fl.Trace, float, Mapping[str, float]], Any] = getattr(import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise UnavailableError(f"there is no {PEER}") from error
        return list(program(costs.trace, share / 100, costs.importance(kind, seed).scores))

    return choose


def adapters(model: nn.Module) -> list[str]:
    """What peft lets train."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]
