"""What watching a step costs: ``python -m benchmarks.watching``.

A MiniLM with a two-class head (8 x 64 tokens) and a CNN (16 x 3 x 64 x 64), AdamW over everything. After the first
steps, which are inspected, steps are timed in turn with the watching on and off, in one process: pairs of steps, the
order of each pair drawn. Timed is the process's own processor time, so that other processes count little. The overhead
is the median of the pairs' ratios less 1.

``--quick`` takes fewer pairs; ``--save`` writes ``benchmarks/results/watching.md``.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from benchmarks.costing import conditions
from frostline.watching.observer import Observer
from frostline.watching.record import Record

RESULTS = Path(__file__).parent / "results"
SEED = 0
WARM_UP = 4
TARGET = 0.05
PROGRESS = Console(stderr=True)


def minilm() -> Callable[[], None]:
    """MiniLM's shape (6 x 384) with a two-class head and random weights, 8 x 64 tokens: one step of training."""
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=2
    )
    model = transformers.BertForSequenceClassification(config).train()
    tokens_BT, labels_B = torch.randint(30_000, (8, 64)), torch.randint(2, (8,))
    return _step(model, lambda: model(input_ids=tokens_BT, labels=labels_B).loss)


def cnn() -> Callable[[], None]:
    """Eight 3x3 convolutions with batch norms, 16 images of 3 x 64 x 64."""
    layers: list[nn.Module] = []
    width = 3
    for wider, stride in ((32, 1), (32, 1), (64, 2), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1)):
        layers += [nn.Conv2d(width, wider, 3, stride, 1, bias=False), nn.BatchNorm2d(wider), nn.ReLU()]
        width = wider
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)).train()
    images_BCHW, labels_B = torch.randn(16, 3, 64, 64), torch.randint(10, (16,))
    return _step(model, lambda: F.cross_entropy(model(images_BCHW), labels_B))


def _step(model: nn.Module, loss_of: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()

    return step


def timed(step: Callable[[], None]) -> float:
    started = time.process_time()
    step()
    return time.process_time() - started


class Watched:
    """Steps under an observer that is put on and taken off around each; only the step itself is timed.

    ``Observer.close`` looks at the values, which is the end of a script and no part of a step: hence `_undo` alone.
    """

    def __init__(self) -> None:
        self.observer = Observer(Record())

    def __enter__(self) -> Watched:
        self.observer.open()
        return self

    def __exit__(self, *error: object) -> None:
        self.observer._undo.close()


def overhead(build: Callable[[], Callable[[], None]], pairs: int, what: str) -> tuple[float, float, float, float]:
    """The median seconds without and with watching, the median overhead, and its quartiles' half distance."""
    torch.manual_seed(SEED)
    choose = random.Random(SEED)
    step, watched = build(), Watched()
    with watched:
        for _ in range(WARM_UP):
            step()
    plain, ours, ratios = [], [], []
    for _ in track(range(pairs), what, console=PROGRESS, refresh_per_second=1):
        seconds = {}
        for on in choose.sample([True, False], 2):
            if on:
                with watched:
                    seconds[on] = timed(step)
            else:
                seconds[on] = timed(step)
        plain.append(seconds[False])
        ours.append(seconds[True])
        ratios.append(seconds[True] / seconds[False])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return statistics.median(plain), statistics.median(ours), middle - 1, (high - low) / 2


def main() -> None:
    """Measure, print, and save if asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.watching", description="What watching a step costs.")
    parser.add_argument("--quick", action="store_true", help="10 pairs of steps instead of 30")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/watching.md")
    options = parser.parse_args()
    pairs = 10 if options.quick else 30
    command = "python -m benchmarks.watching" + " --quick" * options.quick
    lines = [
        "# Watching", "", f"`{command}`", "", *conditions(),
        f"Processor time of {pairs} pairs of steps, one watched and one not, after {WARM_UP} inspected ones.", "",
        "| network | a step | watched | overhead (median of the pairs) | ± | target |",
        "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, build in (("MiniLM, 8 x 64 tokens", minilm), ("CNN, 16 x 3 x 64 x 64", cnn)):
        plain, ours, more, spread = overhead(build, pairs, name)
        lines.append(
            f"| {name} | {1000 * plain:.1f} ms | {1000 * ours:.1f} ms | {100 * more:+.2f} % | {100 * spread:.2f} | "
            f"<= {100 * TARGET:.0f} % |"
        )
    text = "\n".join([*lines, ""])
    print(text)
    if options.save:
        (RESULTS / "watching.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
