"""What a study adapts: a model trained on one kind of data, and a few examples of another."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
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
    """

    epochs: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]


class Task(ABC):
    """One adaptation. All batches have one size, so that one trace tells the cost of every step."""

    name: ClassVar[str]
    title: ClassVar[str]
    metric: ClassVar[str]  # of `scores`: what rows are compared by
    higher: ClassVar[str]  # what it is called on a plot
    settings: Settings
    short: bool  # a few examples and steps, for the tests: its figures mean nothing

    @abstractmethod
    def fresh(self) -> nn.Module:
        """A model trained on the first kind of data, in the modes that it is adapted in."""

    @abstractmethod
    def examples(self, seed: int) -> Any:
        """What a seed adapts with."""

    @abstractmethod
    def batches(self, examples: Any, generator: torch.Generator) -> Iterator[Batch]:
        """One epoch in an order drawn from ``generator``."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss of a batch."""

    @abstractmethod
    def validate(self, model: nn.Module) -> float:
        """`metric` on the validation examples: what learning rates are chosen by."""

    @abstractmethod
    def scores(self, model: nn.Module) -> dict[str, float]:
        """On held-out examples: `metric`, and what else there is to say."""

    @abstractmethod
    def lora(self, model: nn.Module) -> nn.Module:
        """The model with LoRA adapters (peft) in it; what trains then has ``requires_grad`` set."""

    @property
    def num_last(self) -> tuple[int, ...]:
        """The k of the rows that train the last k blocks."""
        return (1, 2, 3)


def cache_folder() -> Path:
    """Where data that was fetched and models that were trained once are kept: ``$FROSTLINE_STUDIES`` or the user's
    cache."""
    folder = Path(os.environ.get("FROSTLINE_STUDIES") or platformdirs.user_cache_path("frostline") / "studies")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
