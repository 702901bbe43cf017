"""What calibration takes, and what one more subset takes after it: ``python -m benchmarks.calibrating``.

1. MiniLM with its real weights, calibrated from nothing: every op that any subset may need.
2. BERT-base's shape, calibrated; then seconds and peak of subsets that nobody asked for before, one after the other.
3. The shape of Llama 3 8B in bfloat16, 1 x 128 tokens: its weights alone are 15 GiB. Each distinct op is timed by
   itself, and the most memory that the process ever held is read.

Each in a process of its own that knows no timing yet. ``--quick`` leaves the third out, which takes a quarter of an
hour; ``--save`` writes ``benchmarks/results/calibrating.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

import frostline as fl
from benchmarks.costing import Row, markdown, most_resident, timed
from benchmarks.models import bert_base, minilm
from examples.llama import llama_3_8b
from frostline.subsets import resolve

RESULTS = Path(__file__).parent / "results"
SUBSETS, SEED, TOKENS = 300, 0, 128
CONSOLE = Console(stderr=True)


def calibrated(trace: fl.Trace) -> dict[str, float]:
    """Calibrate for any subset; returns the seconds it took, and how many op calls were timed or could not be."""
    with Progress(console=CONSOLE) as progress:
        task = progress.add_task("timing ops")
        found, seconds = timed(
            lambda: trace.calibrate(progress=lambda done, total: progress.update(task, completed=done, total=total))
        )
    return {"seconds": seconds, "timed": found.num_timed, "failed": len(found.failed)}


def from_nothing() -> dict[str, float]:
    """Calibrate MiniLM."""
    model, inputs, loss = minilm()
    return calibrated(fl.trace(model, inputs, loss=loss))


def one_more() -> dict[str, float]:
    """Seconds and peak of subsets of BERT-base, each seen for the first time."""
    model, inputs, loss = bert_base()
    trace = fl.trace(model, inputs, loss=loss)
    found = calibrated(trace)
    names, drawn = [name for name, _ in model.named_parameters()], random.Random(SEED)
    taken = []
    for _ in range(SUBSETS):
        subset = resolve(sorted(drawn.sample(names, drawn.randint(1, len(names))), key=names.index), model)
        began = time.perf_counter()
        cost = trace.cost(subset)
        assert cost.step_seconds is not None
        assert cost.peak_bytes is not None
        taken.append(1000 * (time.perf_counter() - began))
    cuts = statistics.quantiles(taken, n=20)
    return {
        **found,
        "median": statistics.median(taken),
        "low": cuts[0],
        "high": cuts[-1],
        "worst": max(taken),
    }


def too_large() -> dict[str, float]:
    """Calibrate the 8B shape, which nobody could run here."""
    model, inputs = llama_3_8b()
    trace = fl.trace(model, {name: tokens[:, :TOKENS] for name, tokens in inputs.items()})
    found = calibrated(trace)
    whole = trace.cost("*")
    assert whole.step_seconds is not None
    held = most_resident()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return {**found, "held": held / 2**30, "weights": weights / 2**30, "step": whole.step_seconds,
            "peak": whole.peak_bytes / 2**30}  # fmt: skip


PARTS: dict[str, Callable[[], dict[str, float]]] = {"minilm": from_nothing, "bert_base": one_more, "llama": too_large}


def apart(part: str) -> dict[str, float]:
    """One part, in a fresh process with an empty store of timings."""
    with tempfile.TemporaryDirectory() as store:
        command = [sys.executable, "-m", "benchmarks.calibrating", "--part", part]
        environment = {**os.environ, "FROSTLINE_CACHE": store}
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    found: dict[str, float] = json.loads(out.splitlines()[-1])
    return found


def said(found: dict[str, float]) -> str:
    """What a calibration took."""
    taken = f"{found['seconds'] / 60:.1f} min" if found["seconds"] > 100 else f"{found['seconds']:.1f} s"
    return f"{taken}, {found['timed']:.0f} timings, {found['failed']:.0f} not to be had"


def rows(quick: bool) -> list[Row]:
    """What was measured, and what it should be."""
    small, bert = apart("minilm"), apart("bert_base")
    found = [
        ("MiniLM calibrated from nothing", said(small), "<= 60 s"),
        ("BERT-base calibrated from nothing", said(bert), ""),
        (f"BERT-base: seconds and peak of one more of {SUBSETS} random subsets",
         f"{bert['median']:.2f} ms (5 to 95 %: {bert['low']:.2f} to {bert['high']:.2f})", "<= 5 ms"),
        ("the slowest of them", f"{bert['worst']:.1f} ms", ""),
    ]  # fmt: skip
    if not quick:
        large = apart("llama")
        found += [
            (f"shape of Llama 3 8B, 1 x {TOKENS} tokens: most resident memory while calibrating",
             f"{large['held']:.2f} GiB (its weights: {large['weights']:.1f} GiB)", "<= 6 GiB"),
            ("its calibration", said(large), ""),
            ("its step with AdamW, predicted", f"{large['step']:.0f} s, {large['peak']:.0f} GiB at the peak", ""),
        ]  # fmt: skip
    return found


def main() -> None:
    """Measure, print, and save if asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibrating", description="What calibration takes.")
    parser.add_argument("--quick", action="store_true", help="without the shape of Llama 3 8B")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/calibrating.md")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(PARTS[options.part]()))
        return
    text = markdown("Calibrating", rows(options.quick), "python -m benchmarks.calibrating" + " --quick" * options.quick)
    print(text)
    if options.save:
        (RESULTS / "calibrating.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
