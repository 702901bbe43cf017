"""How long costing takes, against running the step again under torch's counter: ``python -m benchmarks.costing``.

1. BERT-base, 8 x 128 tokens, train mode: one more random subset by frostline, against forward and backward once more
   under ``FlopCounterMode`` with fake tensors. Both are timed in turn, in one process; where both have an answer the
   FLOPs must agree. Attention is the two matrix products and softmax ("eager"): torch counts fused CPU attention as 0.
2. Trace and first cost of the shapes of Llama 3 8B and Llama 3.1 405B, 1 x 2048 tokens: each in a fresh process that
   knows no probe yet, with the most memory that process ever held.

``--quick`` takes fewer subsets and leaves the 405B shape out; ``--save`` writes ``benchmarks/results/costing.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

import frostline as fl
from frostline.subsets import resolve

RESULTS = Path(__file__).parent / "results"
SEED = 0
MIB = 2**20
LOAD = os.getloadavg()[0]  # before this process adds to it
PROGRESS = Console(stderr=True)

Row = tuple[str, str, str]  # what, measured, target


def bert_base() -> tuple[nn.Module, dict[str, Tensor]]:
    """BERT-base with a two-class head on ``meta``, 8 x 128 tokens, train mode."""
    config = transformers.BertConfig(attn_implementation="eager", num_labels=2)
    with torch.device("meta"):
        model = transformers.BertForSequenceClassification(config)
    tokens_BT, labels_B = torch.zeros(8, 128, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)
    return model.train(), {"input_ids": tokens_BT, "attention_mask": torch.ones_like(tokens_BT), "labels": labels_B}


def random_subsets(model: nn.Module, count: int) -> list[list[str]]:
    """Subsets of 1 to all parameters, every size as likely."""
    choose = random.Random(SEED)
    names = [name for name, _ in model.named_parameters()]
    return [choose.sample(names, choose.randint(1, len(names))) for _ in range(count)]


class Rerun:
    """The step on fake tensors, run again for every subset: what frostline is compared with."""

    def __init__(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        self.model = model
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake:
            self.weights = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in model.named_parameters()}
            self.weights |= {name: torch.empty(b.shape, dtype=b.dtype) for name, b in model.named_buffers()}
        self.inputs = {name: self.fake.from_tensor(value) for name, value in inputs.items()}

    def __call__(self, names: list[str]) -> int:
        """FLOPs of forward and backward with only ``names`` trainable."""
        chosen = set(names)
        with self.fake, FlopCounterMode(display=False) as counter:
            weights = {n: w.detach().requires_grad_(n in chosen) for n, w in self.weights.items()}
            functional_call(self.model, weights, (), self.inputs).loss.backward()
        return counter.get_total_flops()


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What ``run`` returns, and the seconds it took."""
    started = time.perf_counter()
    result = run()
    return result, time.perf_counter() - started


def spread(seconds: list[float]) -> str:
    """The median, and where the middle nine tenths lie, in milliseconds."""
    ordered = sorted(1000 * s for s in seconds)
    low, high = ordered[len(ordered) // 20], ordered[-1 - len(ordered) // 20]
    return f"{statistics.median(ordered):.3g} ms (5 to 95 %: {low:.3g} to {high:.3g})"


def costing_bert(num_subsets: int, num_reruns: int, progress: Callable[..., Any] = track) -> list[Row]:
    """Time subsets of BERT-base by both ways, in turn."""
    model, inputs = bert_base()
    trace, trace_seconds = timed(lambda: fl.trace(model, inputs))
    _, first_seconds = timed(lambda: trace.cost("@all"))
    rerun = Rerun(model, inputs)
    rerun([next(model.named_parameters())[0]])  # warm: fake kernels cache their own decisions
    seen, again, reruns, resolving = [], [], [], []
    drawn = random_subsets(model, num_subsets)
    for number, names in enumerate(progress(drawn, "subsets of BERT-base", console=PROGRESS, refresh_per_second=1)):
        subset, seconds = timed(lambda names=names: resolve(names, model))
        resolving.append(seconds)
        cost, seconds = timed(lambda subset=subset: trace.cost(subset))  # seen for the first time, new probes included
        seen.append(seconds)
        again.append(timed(lambda subset=subset: trace.cost(subset))[1])
        if number % max(1, num_subsets // num_reruns) == 0:
            flops, seconds = timed(lambda names=names: rerun(names))
            reruns.append(seconds)
            if flops != cost.step_flops:
                raise SystemExit(f"torch counts {flops} FLOPs, frostline {cost.step_flops}, for {names}")
    rerun_median, few = statistics.median(reruns), num_subsets // 10
    return [
        ("trace", f"{trace_seconds:.2f} s", ""),
        ("first cost, everything trained (cold: no probe known)", f"{first_seconds:.2f} s", ""),
        (f"one more of {num_subsets} subsets, each seen for the first time", spread(seen), "<= 1 ms"),
        (f"the first {few} of them, while probes are still cold", spread(seen[:few]), ""),
        ("the slowest of them (it asks new probes)", f"{1000 * max(seen):.3g} ms", ""),
        ("each of them once more", spread(again), ""),
        ("turning its names into a Subset, before that", spread(resolving), ""),
        (f"forward and backward under FlopCounterMode, {len(reruns)} of them", spread(reruns), ""),
        ("ratio of the medians", f"{rerun_median / statistics.median(seen):,.0f} x", ">= 300 x"),
        ("FLOPs of the step agree", f"{len(reruns)} of {len(reruns)} subsets", "all"),
    ]


ABOUT = (
    "BERT-base: 12 x 768, float32, 8 x 128 tokens, train mode, eager attention, no weights (meta). Random subsets "
    f"of 1 to all parameters, seed {SEED}. Llama shapes: bfloat16, 1 x 2048 tokens, train mode, no weights."
)
LARGE = {"llama_3_8b": ("Llama 3 8B", 8, None), "llama_405b": ("Llama 3.1 405B", 30, 2)}


def large_here(name: str) -> dict[str, float]:
    """Build, trace and cost one large shape in this process."""
    from examples import llama

    (model, inputs), build = timed(getattr(llama, name))
    trace, tracing = timed(lambda: fl.trace(model, inputs))
    _, costing = timed(lambda: trace.cost("@last:4"))
    _, second = timed(lambda: trace.cost("@last:8"))
    return {"build": build, "trace": tracing, "first": costing, "second": second, "peak_bytes": most_resident()}


def most_resident() -> int:
    """The most bytes of memory that this process ever held."""
    unit = 1024 if sys.platform != "darwin" else 1  # ru_maxrss is in KiB, on macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def costing_large(name: str) -> list[Row]:
    """`large_here` in a fresh process."""
    title, seconds, gib = LARGE[name]
    waiting: AbstractContextManager[Any] = PROGRESS.status(f"tracing the shape of {title} in a process of its own ...")
    with waiting:
        command = [sys.executable, "-m", "benchmarks.costing", "--large", name]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = json.loads(out.splitlines()[-1])
    return [
        (f"{title}: trace + first cost (@last:4)", f"{found['trace'] + found['first']:.1f} s", f"<= {seconds} s"),
        (f"{title}: trace alone / first cost / @last:8 after it",
         f"{found['trace']:.1f} s / {found['first']:.2f} s / {1000 * found['second']:.0f} ms", ""),
        (f"{title}: most resident memory, torch and libraries included",
         f"{found['peak_bytes'] / MIB:,.0f} MiB", f"<= {gib} GiB" if gib else ""),
    ]  # fmt: skip


def processor() -> str:
    """The processor's model, without the machine's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def conditions() -> list[str]:
    """Everything a reader needs to run it again."""
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    memory = ", ".join(f"{name} {value}" for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_"))
    return [
        f"{date.today().isoformat()}. Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, frostline {fl.__version__}.",
        f"{processor()}, {os.cpu_count()} cores; OMP_NUM_THREADS {threads}, torch threads {torch.get_num_threads()}; "
        f"{memory or 'memory as the C library keeps it by itself'}; load average before the run {LOAD:.1f} (above 0: "
        "other processes shared the cores).",
    ]


def markdown(title: str, rows: list[Row], command: str, *about: str) -> str:
    """A result as it is kept; ``about`` says more of what was measured."""
    lines = [
        f"# {title}",
        "",
        f"`{command}`",
        "",
        *conditions(),
        *about,
        "",
        "| what | measured | target |",
        "| --- | --- | --- |",
    ]
    return "\n".join([*lines, *(f"| {what} | {measured} | {target} |" for what, measured, target in rows), ""])


def main() -> None:
    """Measure, print, and save if asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.costing", description="How long costing takes.")
    parser.add_argument("--quick", action="store_true", help="40 subsets instead of 300, without the 405B shape")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/costing.md")
    parser.add_argument("--large", choices=LARGE, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.large:
        print(json.dumps(large_here(options.large)))
        return
    rows = costing_bert(40, 8) if options.quick else costing_bert(300, 30)
    for name in ["llama_3_8b"] if options.quick else LARGE:
        rows += costing_large(name)
    text = markdown("Costing", rows, "python -m benchmarks.costing" + " --quick" * options.quick, ABOUT)
    print(text)
    if options.save:
        (RESULTS / "costing.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
