"""What ``make demo`` runs: what training part of six networks costs, said before anything trains.

The figures printed here are the figures ``tests/test_examples.py`` checks, most of them against hand arithmetic: both
come from `comparisons` and `loops`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import frostline as fl
from examples import llama, minilm, small
from frostline.costing.comparison import Comparison

FIGURES = (
    "forward_flops", "grad_input_flops", "grad_weight_flops", "recompute_flops", "backward_flops", "step_flops",
    "saved_bytes", "gradient_bytes", "optimizer_bytes", "parameter_bytes",
)  # fmt: skip
METHODS = ("optimizer-only", "backward-inputs", "freeze")


@dataclass(frozen=True)
class Part:
    """One network of the demo: how to build it and which subsets to cost, by label."""

    title: str
    target: Callable[[], tuple[Any, ...]]
    subsets: dict[str, str]
    methods: tuple[str, ...] = ("freeze",)


PARTS = {
    "middle": Part(
        "(a) Linear 10-20-10-5 with ReLU, one sample: only the middle layer trains",
        small.middle_layer,
        {"middle layer": "2", "everything": "@all"},
    ),
    "cnn": Part(
        "(b, c) A CNN on a 3 x 28 x 28 image: the two fc layers, beside everything",
        small.digits_cnn,
        {"fc1, fc2": "fc1, fc2", "everything": "@all"},
    ),
    "ten": Part(
        "(d) Ten equal layers, the fifth trained, by three methods",
        small.ten_layers,
        {"layer 5": "4"},
        METHODS,
    ),
    "minilm": Part(
        "(e) The pretrained MiniLM with a two-class head, 32 sentences of 64 tokens",
        minilm.sentiment,
        {"head": "@head", "last block": "@last:1", "biases": "@biases", "norms": "@norms", "everything": "@all"},
    ),
    "llama": Part(
        "(f) The shape of Llama 3 8B without weights, 1 x 2048 tokens: the last 4 of 32 blocks",
        llama.llama_3_8b,
        {
            "last 4, head": "@last:4",
            "last 4 alone": "@last:4, !lm_head, !model.norm",
            "everything": "@all",
        },
    ),
}


@cache
def comparison(part: str) -> Comparison:
    """Trace one network and cost its subsets. Nothing is trained and no weight is read."""
    chosen = PARTS[part]
    trace = fl.trace(*chosen.target())
    return trace.compare(dict(chosen.subsets), methods=chosen.methods)


def figures(part: str) -> dict[str, dict[str, int]]:
    """The exact figures of every row of one network, by row and by name."""
    return {label: {name: getattr(cost, name) for name in FIGURES} for label, cost in comparison(part)}


@dataclass(frozen=True)
class Loop:
    """What three real training steps by one method did.

    Attributes:
        grad_weight_layers: the layers, counted from 1, whose weight has a ``.grad`` afterwards.
        grad_input_layers: the layers whose gradient towards their input was computed.
        step_flops: FLOPs of one step, as torch counted them while it ran.
        first_grad_norms: the norm of layer 1's ``weight.grad`` after each step; empty if it has none.
    """

    grad_weight_layers: tuple[int, ...]
    grad_input_layers: tuple[int, ...]
    step_flops: int
    first_grad_norms: tuple[float, ...]


def run_loop(method: str) -> Loop:
    """Train layer 5 of ten for three steps on real tensors, and look which gradients there are."""
    model, x_BI, loss_of = small.ten_layers()
    trained = list(model[4].parameters())
    if method == "freeze":
        model.requires_grad_(False)
        model[4].requires_grad_(True)
    optimizer = torch.optim.SGD(trained, lr=0.1)
    grad_input_layers: set[int] = set()

    def watch_input(number: int) -> Callable[[Any, tuple[Tensor]], None]:
        def hook(_layer: Any, inputs: tuple[Tensor]) -> None:
            if inputs[0].requires_grad:
                inputs[0].register_hook(lambda _grad: grad_input_layers.add(number))

        return hook

    for number, layer in enumerate(model, start=1):
        layer.register_forward_pre_hook(watch_input(number))
    norms, flops = [], 0
    for _ in range(3):
        optimizer.zero_grad()
        with FlopCounterMode(display=False) as counter:
            loss_of(model(x_BI)).backward(inputs=trained if method == "backward-inputs" else None)
        flops = counter.get_total_flops()
        optimizer.step()
        if model[0].weight.grad is not None:
            norms.append(model[0].weight.grad.norm().item())
    with_grad = tuple(number for number, layer in enumerate(model, start=1) if layer.weight.grad is not None)
    return Loop(with_grad, tuple(sorted(grad_input_layers)), flops, tuple(norms))


@cache
def loops() -> dict[str, Loop]:
    """`run_loop` by each method."""
    return {method: run_loop(method) for method in METHODS}


def spans(numbers: tuple[int, ...]) -> str:
    """Spell layer numbers shortly.

    >>> spans((1, 2, 3, 5))
    '1-3, 5'
    >>> spans(())
    'none'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "none"


def loop_table() -> Table:
    """What the three loops computed on real tensors, beside what frostline says."""
    said = comparison("ten")
    table = Table(
        title="Three steps of each loop, really run (FLOPs are of one step)", title_justify="left", box=box.SIMPLE
    )
    for head in ("loop", "grad_weight\nof layers", "grad_input\nof layers"):
        table.add_column(head, no_wrap=True)
    for head in ("FLOPs, as\ntorch counted", "FLOPs, by\nfrostline", "norm of layer 1's grad\nafter each step"):
        table.add_column(head, justify="right", no_wrap=True)
    for method, loop in loops().items():
        norms = ", ".join(f"{norm:.4f}" for norm in loop.first_grad_norms) or "None"
        layers = (spans(loop.grad_weight_layers), spans(loop.grad_input_layers))
        table.add_row(method, *layers, f"{loop.step_flops:,}", f"{said[method].step_flops:,}", norms)
    return table


def main() -> None:
    """Print every part, with the time it took."""
    console = Console(width=None if sys.stdout.isatty() else 100)
    for name, part in PARTS.items():
        console.print(part.title, style="bold")
        started = time.perf_counter()
        with console.status(f"tracing {part.target.__name__} ..."):
            found = comparison(name)
        console.print(f"built, traced and costed in {time.perf_counter() - started:.1f} s", style="dim")
        print(found)
        if name == "ten":
            console.print(loop_table())
            console.print(
                "optimizer-only hands the optimizer layer 5 alone, and computes every gradient there is. The optimizer "
                "never clears the gradients it does not own, so they grow step by step. Freezing the rest computes "
                "what layer 5 needs: grad_input of the layers after it, grad_weight of its own, nothing before it."
            )
        console.print()


if __name__ == "__main__":
    main()
