"""Predicted seconds and peak memory against real runs: ``python -m benchmarks.accuracy [MODEL ...] [--save]``.

Every network of `benchmarks.models`, calibrated; then eight subsets drawn, each by every method of eager torch; then
all of them really run in a fresh process, turn by turn, the full step twice. Where these two lie more than a tenth
apart the machine was disturbed, and the network is run again, at most twice. Prints every case, the worst first, and a
summary; ``--save`` writes ``benchmarks/results/accuracy.md``, ``.json`` and the README's table, where networks that
are not run again stay.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import frostline as fl
from benchmarks.costing import conditions
from benchmarks.larger import TIMES
from benchmarks.models import MODELS
from frostline.measuring.case import Case, Source
from frostline.measuring.measured import Outcome
from frostline.measuring.rounds import measure_cases
from frostline.subsets import num_blocks
from frostline.targets import load

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
CNNS = ("efficientnet_lite0", "resnet50", "unet")
FILES = ("models.py", "larger.py")
METHODS = ("freeze", "optimizer-only", "backward-inputs")
DIFFERENT = 0.05  # of the seconds: pairs closer than this have no order
DISTURBED = 0.1  # two runs of the same lie further apart


@dataclass(frozen=True)
class Row:
    """One subset of one network by one method. Seconds, and bytes."""

    model: str
    subset: str
    method: str
    predicted_seconds: float
    measured_seconds: float
    spread_seconds: float
    noise: float  # of the network: how far two runs of the same lie apart, as a share
    predicted_ratio: float
    measured_ratio: float
    predicted_peak: int
    measured_peak: int
    predicting_seconds: float

    @property
    def error(self) -> float:
        """Of the seconds, as a share."""
        return self.predicted_seconds / self.measured_seconds - 1

    @property
    def peak_error(self) -> float:
        """Of the peak, as a share."""
        return self.predicted_peak / self.measured_peak - 1


def subsets(model: torch.nn.Module, seed: str) -> dict[str, list[str]]:
    """Eight subsets: everything, a head, last blocks, biases, and random ones of every size."""
    names = [name for name, p in model.named_parameters() if p.is_floating_point()]
    rng = random.Random(seed)
    found = {
        "@all": names,
        "last two tensors": names[-2:],
        "last half": names[len(names) // 2 :],
        "last quarter": names[-max(1, len(names) // 4) :],
        "biases": [name for name in names if name.endswith("bias")] or names[::3],
    }
    for number, share in enumerate((0.03, 0.2, 0.6)):
        chosen = rng.sample(range(len(names)), max(1, int(share * len(names))))
        found[f"random {number + 1}"] = [names[i] for i in sorted(chosen)]
    return found


def rows_of(name: str, rounds: int, seed: str, file: str = "models.py", device: str | None = None) -> Iterator[Row]:
    """The rows of one network of a ``file`` of this folder."""
    target = f"{Path(__file__).parent / file}:{name}"
    built = load(target)
    model = built.model.to(device or "cpu").train()
    trace = fl.trace(model, built.inputs, built.loss, device)
    name = name if file == FILES[0] else f"{name}, {TIMES} x"
    start = time.perf_counter()
    trace.calibrate()
    print(f"{name}: calibrated in {time.perf_counter() - start:.1f} s, {num_blocks(model)} blocks", flush=True)
    full = trace.cost("@all")
    asked = [(label, names, method) for label, names in subsets(model, seed).items() for method in METHODS]
    cases = [Case.of(tuple(names), method, "adamw") for _, names, method in asked]
    again = Case.of(tuple(full.subset.names), "freeze", "adamw")
    source = Source(target, eval_mode=False, device=device)
    assert full.step_seconds is not None
    for _ in range(3):
        first, *measured, last = measure_cases(
            source, [again, *cases, again], rounds=rounds if full.step_seconds < 0.7 else max(1, rounds - 1), warm_up=2,
            threads=torch.get_num_threads(), together=True, examine=True,
        )  # fmt: skip
        ends = [_seconds(first), _seconds(last)]
        whole = statistics.mean(ends)
        noise = abs(ends[0] - ends[1]) / whole
        if noise <= DISTURBED:
            break
        print(f"{name}: two runs of the same lie {noise:.0%} apart", flush=True)
    for (label, names, method), outcome in zip(asked, measured, strict=True):
        found = outcome.measured
        if found is None:
            print(f"{name} {label} {method}: {outcome.error}", flush=True)
            continue
        cost = trace.cost(names, method=method)
        assert cost.step_seconds is not None
        cost = trace.cost(names, method=method)
        start = time.perf_counter()
        seconds, peak = cost.step_seconds, cost.peak_bytes
        took = time.perf_counter() - start
        assert seconds is not None
        yield Row(
            name, label, method, seconds, found.step_seconds, found.spread_seconds, noise,
            seconds / full.step_seconds, found.step_seconds / whole, peak, found.peak_bytes, took,
        )  # fmt: skip


def _seconds(outcome: Outcome) -> float:
    assert outcome.measured is not None, outcome.error
    return outcome.measured.step_seconds


def quantile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of the values are not above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def kendall_tau(rows: Sequence[Row]) -> float:
    """Over pairs of one network whose measured seconds differ by more than `DIFFERENT`."""
    agree = pairs = 0
    for i, a in enumerate(rows):
        for b in rows[:i]:
            if a.model != b.model or abs(a.measured_seconds / b.measured_seconds - 1) <= DIFFERENT:
                continue
            pairs += 1
            same = (a.predicted_seconds - b.predicted_seconds) * (a.measured_seconds - b.measured_seconds) > 0
            agree += 1 if same else -1
    return agree / pairs if pairs else 1.0


def summary(rows: Sequence[Row]) -> list[tuple[str, str, str, str, str, str, str]]:
    """Per network, and for all."""
    lines = []
    networks = list(dict.fromkeys(row.model for row in rows))
    together = f"all {len(networks)}"
    for name in (*networks, together):
        own = [row for row in rows if name in (row.model, together)]
        errors = [abs(row.error) for row in own]
        peaks = [abs(row.peak_error) for row in own]
        ratios = [abs(row.predicted_ratio - row.measured_ratio) for row in own]
        noise = statistics.median(row.noise for row in own)
        lines.append(
            (
                name, f"{statistics.median(errors):.1%}", f"{quantile(errors, 0.9):.1%}", f"{noise:.1%}",
                f"{100 * statistics.median(ratios):.1f}", f"{kendall_tau(own):.3f}",
                f"{statistics.median(peaks):.2%} / {max(peaks):.2%}",
            )
        )  # fmt: skip
    return lines


HEAD = (
    "network", "time: median error", "90th percentile", "two runs of the same apart", "ratio to full, points off",
    "order (Kendall tau)", "peak: median / worst error",
)  # fmt: skip


def markdown(rows: Sequence[Row]) -> list[str]:
    """The summary as a table."""
    body = ["| " + " | ".join(line) + " |" for line in summary(rows)]
    return ["| " + " | ".join(HEAD) + " |", "|" + " --- |" * len(HEAD), *body]


def write_readme(table: Sequence[str]) -> None:
    """Put the table in the place of the one that the README has."""
    lines = README.read_text(encoding="utf-8").splitlines()
    start = lines.index(table[0])
    end = next(number for number in range(start, len(lines)) if not lines[number].startswith("|"))
    README.write_text("\n".join([*lines[:start], *table, *lines[end:], ""]), encoding="utf-8")


def main() -> None:
    """Run, print, and save if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", choices=[[], *(build.__name__ for build in MODELS)])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", default="after calibration")
    parser.add_argument(
        "--device", help="run there, also with batches 16 times as large; saved apart, not in the README"
    )
    parser.add_argument("--save", action="store_true")
    asked = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    rows: list[Row] = []
    for build in MODELS:
        if not asked.models or build.__name__ in asked.models:
            for file in FILES if asked.device else FILES[:1]:
                rows += rows_of(build.__name__, asked.rounds, asked.seed, file, asked.device)
            if asked.save:
                save(rows, asked.device)
    console = Console()
    table = Table("network", "subset", "method", "predicted", "measured", "error", "ratio", "measured", "peak error")
    for row in sorted(rows, key=lambda row: -abs(row.error)):
        table.add_row(
            row.model, row.subset, row.method, f"{1e3 * row.predicted_seconds:.1f} ms",
            f"{1e3 * row.measured_seconds:.1f} ± {1e3 * row.spread_seconds:.1f} ms", f"{row.error:+.1%}",
            f"{row.predicted_ratio:.1%}", f"{row.measured_ratio:.1%}", f"{row.peak_error:+.2%}",
        )  # fmt: skip
    console.print(table)
    found = Table(*HEAD)
    for line in summary(rows):
        found.add_row(*line)
    console.print(found)
    print(f"predicting one subset more: {1e3 * statistics.median(row.predicting_seconds for row in rows):.2f} ms")
    for label, own in (
        ("CNNs", [r for r in rows if r.model in CNNS]),
        ("others", [r for r in rows if r.model not in CNNS]),
    ):
        if own:
            print(f"peak of {label}: at most {max(abs(row.peak_error) for row in own):.2%} off")


def save(rows: Sequence[Row], device: str | None = None) -> None:
    """Write both files, and of the CPU the README's table; other networks stay as they are."""
    kept = RESULTS / (f"accuracy-{device}.json" if device else "accuracy.json")
    before = [Row(**row) for row in json.loads(kept.read_text())] if kept.exists() else []
    anew = {row.model for row in rows}
    order = [build.__name__ + suffix for build in MODELS for suffix in ("", f", {TIMES} x")]
    rows = sorted([*rows, *(row for row in before if row.model not in anew)], key=lambda row: order.index(row.model))
    table = markdown(rows)
    where = [f"On {torch.cuda.get_device_name(device)}; {TIMES} x: so large a batch.", ""] if device else []
    text = ["# Predicted against measured", "", *where, *table, "", *conditions(), ""]
    kept.with_suffix(".md").write_text("\n".join(text), encoding="utf-8")
    kept.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    if device is None:
        write_readme(table)


if __name__ == "__main__":
    main()
