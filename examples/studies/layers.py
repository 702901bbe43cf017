"""What a first step looks like from inside, layer by layer: shapes, ranges of values, norms of gradients."""

from __future__ import annotations

from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

import frostline as fl
from examples.studies.task import Task


def layers(task: Task) -> Table:
    """A line for each module without modules inside: its output, and the norm of its parameters' gradients."""
    seed = task.settings.seeds[0]
    model = task.fresh(seed)
    batch = next(task.batches(task.examples(seed), torch.Generator().manual_seed(seed)))
    norms = fl.importance(model, [batch], step=task.loss, kind="gradient_norm").scores
    table = Table(title=f"{task.title}: the first step", box=box.SIMPLE)
    for head in ("layer", "output", "smallest", "largest", "mean", "parameters", "gradient norm"):
        table.add_column(head, justify="left" if head in ("layer", "output") else "right")

    def show(name: str, module: nn.Module, output: Any) -> None:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        own = {f"{name}.{key}": parameter for key, parameter in module.named_parameters(recurse=False)}
        norm = sum(norms.get(key, 0.0) ** 2 for key in own) ** 0.5
        table.add_row(
            name, "x".join(map(str, output.shape)), f"{output.min().item():.3g}", f"{output.max().item():.3g}",
            f"{output.mean().item():.3g}", f"{sum(p.numel() for p in own.values()):,}", f"{norm:.3g}" if own else "",
        )  # fmt: skip

    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: show(name, module, output))
        for name, module in model.named_modules()
        if not list(module.children())
    ]
    with torch.no_grad():
        task.loss(model, batch)
    for handle in handles:
        handle.remove()
    return table
