"""What a study adapts: a model trained on one kind of data, and a few examples of another."""

from __future__ import annotations

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import platformdirs
import torch
from torch import Tensor, nn

Batch = Any


@dataclass(frozen=True)
class Settings:
    """How every row of a study is trained: the same for all of them.

    Attributes:
        epochs: passes over the examples.
        rates: learning rates (AdamW) to choose from, by the validation examples and the first seed.
        seeds: each draws its own examples to adapt with, their order, and what dropout drops.
        points: how many times, spread over the epochs, the validation examples are looked at.
    """

    epochs: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    points: int = 3


class Task(ABC):
    """One adaptation. All batches have one size, so that one trace tells the cost of every step."""

    name: ClassVar[str]
    title: ClassVar[str]
    metric: ClassVar[str]  # of `scores`: what rows are compared by
    higher: ClassVar[str]  # what it is called on a plot
    last: ClassVar[dict[str, str | list[str]]]  # the rows that train the last k blocks, by label
    batch_size: ClassVar[int]  # of training
    shares: tuple[int, ...] = (50, 35)  # percent of a full step's predicted seconds that plans may take
    settings: Settings
    short: bool  # a few examples and steps, for the tests: its figures mean nothing
    num_examples: int  # to adapt with

    @abstractmethod
    def start(self, seed: int) -> nn.Module:
        """A model trained on the first kind of data, in the modes it is adapted in, ready for a seed's examples."""

    def fresh(self, seed: int) -> nn.Module:
        """A copy of `start`, which is made once for each seed."""
        if seed not in self._starts:
            self._starts[seed] = self.start(seed)
        return copy.deepcopy(self._starts[seed])

    @cached_property
    def _starts(self) -> dict[int, nn.Module]:
        return {}

    @abstractmethod
    def examples(self, seed: int) -> Any:
        """What a seed adapts with."""

    @abstractmethod
    def batches(self, examples: Any, generator: torch.Generator) -> Iterator[Batch]:
        """One epoch in an order drawn from ``generator``."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of a batch."""

    @property
    @abstractmethod
    def validation(self) -> Any:
        """The examples that learning rates are chosen by."""

    @abstractmethod
    def score(self, model: nn.Module, examples: Any) -> float:
        """`metric` on some examples, dropout off."""

    @abstractmethod
    def scores(self, model: nn.Module) -> dict[str, float]:
        """On held-out examples: `metric`, and what else there is to say."""

    @abstractmethod
    def lora(self, model: nn.Module) -> nn.Module:
        """The model with LoRA adapters (peft) in it; what trains then has ``requires_grad`` set."""


def cache_folder() -> Path:
    """Where data that was fetched and models that were trained once are kept: ``$FROSTLINE_STUDIES`` or the user's
    cache."""
    folder = Path(os.environ.get("FROSTLINE_STUDIES") or platformdirs.user_cache_path("frostline") / "studies")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
