"""What training a part keeps and takes, by method: ``python -m benchmarks.training [NETWORK ...] [--save]``.

Each network's subsets by ``freeze``, by the scheme of memsave_torch (`benchmarks.memsave`) and by
`frostline.train_only`, or with ``--compile`` by ``freeze`` and torch.compile: really run in fresh processes, turn by
turn. Prints, for each row, what autograd kept when the loss returned, the peak that torch's allocator saw, and a step's
seconds, beside ``freeze`` (of each round's two turns, which lie seconds apart, the ratio; of the rounds, the median);
``--save`` writes ``benchmarks/results/training.md`` and ``.json``, where rows that were not run again stay. CNNs run
with their batch norms in eval mode, as when few images are at hand. On another ``--device``, with larger batches and
saved apart, ``freeze`` and ``train-only`` are run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import models
from benchmarks.accuracy import quantile
from benchmarks.costing import conditions
from benchmarks.larger import TIMES
from frostline.measuring.case import Case, Source
from frostline.measuring.rounds import measure_cases

HERE = Path(__file__).parent
CNNS = ("resnet50_larger", "efficientnet_lite0", "unet")
NETWORKS = (*CNNS, "minilm", "vit", "llama", "lora_bert")
EARLY = ("first block", "norms", "biases")
WAYS = {"freeze": "models.py", "memsave": "memsave.py", "train-only": "models.py", "compile": "compiled.py"}
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Row:
    """One subset of one network in one way."""

    network: str
    subset: str
    way: str
    kept_bytes: int
    peak_bytes: int
    step_seconds: float
    spread_seconds: float
    beside_freeze: float


def subsets(model: nn.Module) -> dict[str, list[str]]:
    """The parameters of the first eighth of the tensors, of norms, biases, the last eighth, LoRA's, and all."""
    names = [name for name, p in model.named_parameters() if p.is_floating_point()]
    norms = {
        f"{name}." for name, m in model.named_modules() if isinstance(m, NORMS) or type(m).__name__.endswith("Norm")
    }
    found = {
        "first block": names[: max(1, len(names) // 8)],
        "norms": [name for name in names if f"{name.rpartition('.')[0]}." in norms],
        "biases": [name for name in names if name.endswith("bias")],
        "last block": names[-max(1, len(names) // 8) :],
        "LoRA": [name for name in names if ".lora_" in name],
        "all": names,
    }
    return {label: chosen for label, chosen in found.items() if chosen}


def rows_of(network: str, ways: Sequence[str], rounds: int | None, device: str | None = None) -> Iterator[Row]:
    """The rows of one network."""
    model, *_ = getattr(models, network)()
    asked = [(label, names, way) for label, names in subsets(model).items() for way in ways]
    if network == "lora_bert":
        asked = [each for each in asked if each[0] == "LoRA"]
    eval_mode = network in CNNS
    files = ["larger.py" if device else WAYS[way] for _, _, way in asked]
    sources = [Source(f"{HERE / file}:{network}", eval_mode=eval_mode, device=device) for file in files]
    cases = [Case.of(tuple(names), "train-only" if way == "train-only" else "freeze") for _, names, way in asked]
    outcomes = measure_cases(
        sources, cases, rounds=rounds, warm_up=2, threads=torch.get_num_threads(), together=True, examine=True
    )
    by_case = list(zip(asked, outcomes, strict=True))
    freeze = {label: outcome.measured for (label, _, way), outcome in by_case if way == "freeze"}
    for (label, _, way), outcome in by_case:
        found = outcome.measured
        if found is None or freeze[label] is None:
            print(f"{network} {label} {way}: {outcome.error}", flush=True)
            continue
        kept = found.at_loss_bytes if found.saved_bytes is None else found.saved_bytes  # (compiled: the loss too)
        peak = found.peak_bytes
        pairs = zip(found.turns, freeze[label].turns, strict=True)
        slower = statistics.median(ours / own for ours, own in pairs)
        yield Row(network, label, way, kept, peak, found.step_seconds, found.spread_seconds, slower)


def beside(rows: Sequence[Row], way: str) -> list[tuple[Row, Row]]:
    """Every row of a way, with that of ``freeze``."""
    base = {(row.network, row.subset): row for row in rows if row.way == "freeze"}
    return [(row, base[row.network, row.subset]) for row in rows if row.way == way]


def verdicts(rows: Sequence[Row]) -> list[str]:
    """What the rows say of ``train-only``."""
    pairs = beside(rows, "train-only")
    if not pairs:
        return []
    times = [row.beside_freeze for row, _ in pairs]
    fewest: dict[tuple[str, str], int] = {}
    for row in rows:
        if row.way != "compile":
            key = (row.network, row.subset)
            fewest[key] = min(fewest.get(key, row.kept_bytes), row.kept_bytes)
    lowest = sum(row.kept_bytes == fewest[row.network, row.subset] for row, _ in pairs)
    early = {
        subset: [b.peak_bytes / r.peak_bytes for r, b in pairs if r.network in CNNS and r.subset == subset]
        for subset in EARLY
    }
    kept = [b.kept_bytes / r.kept_bytes for r, b in pairs if r.kept_bytes]
    found = [
        f"kept bytes: the lowest, or equal to it, in {lowest} of {len(pairs)} rows; "
        f"{statistics.median(kept):.2f} x less than freeze at the median, {max(kept):.1f} x at most",
        f"seconds of a step: {statistics.median(times):.3f} x freeze at the median, {max(times):.3f} x in the worst "
        f"row, {quantile(times, 0.9):.3f} x at the 90th percentile",
    ]
    if any(early.values()):
        each = ", ".join(f"{min(of):.2f} to {max(of):.2f} x ({subset})" for subset, of in early.items() if of)
        found.append(f"peak of CNNs less than freeze: {each}; a batch norm that trains reads its input")
    return found


HEAD = ("network", "subset", "way", "kept", "beside freeze", "peak", "beside freeze", "step", "beside freeze")


def cells(row: Row, base: Row) -> tuple[str, ...]:
    kept = row.kept_bytes / base.kept_bytes if base.kept_bytes else 1.0
    return (
        row.network, row.subset, row.way, f"{row.kept_bytes / 2**20:.2f} MiB", f"{kept:.3f}",
        f"{row.peak_bytes / 2**20:.1f} MiB", f"{row.peak_bytes / base.peak_bytes:.3f}",
        f"{1e3 * row.step_seconds:.1f} ± {1e3 * row.spread_seconds:.1f} ms", f"{row.beside_freeze:.3f}",
    )  # fmt: skip


def table(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Every row as text."""
    base = {(row.network, row.subset): row for row in rows if row.way == "freeze"}
    return [cells(row, base[row.network, row.subset]) for row in rows]


def save(rows: Sequence[Row], device: str | None = None) -> None:
    """Write both files; other rows stay as they are."""
    kept = HERE / "results" / (f"training-{device}.json" if device else "training.json")
    before = [Row(**row) for row in json.loads(kept.read_text())] if kept.exists() else []
    anew = {(row.network, row.way) for row in rows}
    subset_order = list(dict.fromkeys(row.subset for row in (*rows, *before)))
    rows = sorted(
        [*rows, *(row for row in before if (row.network, row.way) not in anew)],
        key=lambda row: (NETWORKS.index(row.network), subset_order.index(row.subset), list(WAYS).index(row.way)),
    )
    lines = ["# Training a part, by method", "", *(f"- {line}" for line in verdicts(rows)), ""]
    lines += ["| " + " | ".join(HEAD) + " |", "|" + " --- |" * len(HEAD)]
    lines += ["| " + " | ".join(line) + " |" for line in table(rows)]
    if device:
        lines += ["", f"On {torch.cuda.get_device_name(device)}; batches {TIMES} x those of the table of the CPU."]
    kept.with_suffix(".md").write_text("\n".join([*lines, "", *conditions(), ""]))
    kept.write_text(json.dumps([asdict(row) for row in rows], indent=1))


def main() -> None:
    """Run, print, and save if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", choices=[[], *NETWORKS])
    parser.add_argument("--rounds", type=int, help="turns of each case; else 5 to 25, as fit in a minute")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile in place of the others: a minute or more for each row"
    )
    parser.add_argument("--device", help="run there, with batches that give an accelerator work")
    parser.add_argument("--save", action="store_true")
    asked = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    if asked.device and asked.compile:
        parser.error("--compile is for the CPU's table, without --device")
    ways = ["freeze", "compile"] if asked.compile else [way for way in WAYS if way != "compile"]
    if asked.device:
        ways.remove("memsave")
    rows: list[Row] = []
    for network in NETWORKS:
        if not asked.networks or network in asked.networks:
            print(network, flush=True)
            rows += rows_of(network, ways, asked.rounds, asked.device)
            if asked.save:
                save([row for row in rows if row.way == "compile" or not asked.compile], asked.device)
    console = Console()
    shown = Table(*HEAD)
    for line in table(rows):
        shown.add_row(*line)
    console.print(shown)
    print("\n".join(verdicts(rows)))


if __name__ == "__main__":
    main()
