"""Training a subset of a model, timed; and training the model that a study starts from, once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import frostline as fl
from examples.studies.task import Task

Progress = Callable[[int, int], None]


@dataclass
class Trained:
    """What training took, and how it went.

    Attributes:
        step_seconds: of each step, optimizer included: processor time with one thread, else by the wall clock.
        losses: the mean training loss of each epoch.
        looked: the epochs after which `Task.score` was taken, of the ``training`` and the ``validation`` examples.
    """

    step_seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    looked: list[int] = field(default_factory=list)
    training: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return sum(self.step_seconds)

    @property
    def steps(self) -> int:
        return len(self.step_seconds)


def adapt(
    task: Task,
    model: nn.Module,
    names: Sequence[str],
    rate: float,
    seed: int,
    *,
    epochs: int,
    examples: Any = None,
    points: int = 0,
    progress: Progress | None = None,
) -> Trained:
    """Train ``names`` by `frostline.train_only`: AdamW, the rate falling to zero along a line.

    Args:
        examples: by default those of the seed.
        points: how many times, spread over the epochs, the scores are taken.
    """
    examples = task.examples(seed) if examples is None else examples
    order = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout
    trained = Trained()
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    epoch_steps = sum(1 for _ in task.batches(examples, torch.Generator().manual_seed(0)))
    total = epochs * epoch_steps
    with fl.train_only(model, list(names)) as run:
        optimizer = torch.optim.AdamW(run.parameters(), lr=rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total)
        for epoch in range(1, epochs + 1):
            losses = []
            for batch in task.batches(examples, order):
                start = clock()
                optimizer.zero_grad()
                loss = task.loss(model, batch)
                loss.backward()
                optimizer.step()
                schedule.step()
                trained.step_seconds.append(clock() - start)
                losses.append(loss.item())
                if progress is not None:
                    progress(trained.steps, total)
            trained.losses.append(sum(losses) / len(losses))
            if epoch * points // epochs > (epoch - 1) * points // epochs:
                trained.looked.append(epoch)
                trained.training.append(task.score(model, examples))
                trained.validation.append(task.score(model, task.validation))
    return trained


def source_trained(
    task: Task, model: nn.Module, path: Path, examples: Any, *, epochs: int, rate: float, seed: int = 0
) -> nn.Module:
    """``model`` trained on the first kind of data: read from ``path``, or trained now and written there."""
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    from rich.progress import Progress as Bar

    everything = [name for name, parameter in model.named_parameters() if parameter.is_floating_point()]
    with Bar(transient=True) as bar:
        row = bar.add_task(f"{task.name}: the model to start from", total=None)
        adapt(
            task, model, everything, rate, seed, epochs=epochs, examples=examples,
            progress=lambda done, total: bar.update(row, completed=done, total=total),
        )  # fmt: skip
    part = path.with_suffix(".part")
    torch.save(model.state_dict(), part)
    part.replace(path)
    return model
