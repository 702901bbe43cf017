"""What a fix saves, predicted and really run: ``python -m benchmarks.fixes [RULE ...] [--save]``.

For each rule of `frostline watch` whose findings have figures, a script of a real size that has the fault is watched,
and calibrated; then it and the same script with the fix put where the report says are both run as ``frostline measure``
runs a training script, turn by turn in fresh processes. FLOPs and kept bytes have to be equal to what was said, and
seconds saved within the stated error of both predictions, both for the machine as fast as it was when the scripts ran:
a reference kernel is looked at around each turn, as it is between the ops that are timed. What page faults took stands
beside. ``--save`` writes ``benchmarks/results/fixes.md`` and ``fixes.json``.

``unneeded-saved-tensors``'s fix is a run of `frostline.train_only`, which the script opens itself: there the first
script is run by that method.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.costing import conditions
from frostline import targets
from frostline.measuring.case import Case, Source
from frostline.measuring.measured import Measured
from frostline.measuring.rounds import measure_cases
from frostline.probing.timings import Reference
from frostline.watching.finding import Figures, Finding
from frostline.watching.script import Script
from frostline.watching.watch import Watch

HERE = Path(__file__).parent
OWN_RUN = "unneeded-saved-tensors"
HEAD = """
import torch
import torch.nn.functional as F
from torch import nn

torch.manual_seed(0)


def convolutions(*widths):
    rows = [(nn.Conv2d(a, b, 3, padding=1), nn.ReLU()) for a, b in zip(widths, widths[1:])]
    return nn.Sequential(*(layer for row in rows for layer in row), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def encoder(depth, width=256):
    layers = (nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True) for _ in range(depth))
    return nn.Sequential(*layers)


def linears(depth, width=256):
    return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())))


images, labels = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))
tokens = torch.randint(1000, (8, 64))
"""
STEP = """
for _ in range(12):
    optimizer.zero_grad()
    loss = {loss}
    loss.backward()
    optimizer.step()
"""
SCRIPTS = {
    "unowned-grad": """
model = nn.Sequential(convolutions(3, 32, 64, 64), nn.Linear(64, 10))
optimizer = torch.optim.AdamW(model[1].parameters())
"""
    + STEP.format(loss="F.cross_entropy(model(images), labels)"),
    "early-param-forces-backward": """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.body, self.head = nn.LayerNorm(256), linears(12), nn.Linear(256, 1000)

    def forward(self, x):
        return self.head(self.body(self.norm(x)))

model = Net()
model.body.requires_grad_(False)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
features = torch.randn(512, 256)
"""
    + STEP.format(loss="F.cross_entropy(model(features), tokens.flatten())"),
    "forced-input-grad": """
from transformers import BertConfig, BertForSequenceClassification

config = BertConfig(vocab_size=1000, hidden_size=256, num_hidden_layers=6, num_attention_heads=4,
                    intermediate_size=1024, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
model = BertForSequenceClassification(config)
model.bert.requires_grad_(False)
model.bert.encoder.layer[5].requires_grad_(True)
model.enable_input_require_grads()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
"""
    + STEP.format(loss="model(input_ids=tokens, labels=labels % 2).loss"),
    "tied-surprise": """
class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Embedding(1000, 256), encoder(4)
        self.head = nn.Linear(256, 1000, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens)))

model = Language()
model.body.requires_grad_(False)
optimizer = torch.optim.AdamW(model.head.parameters())
"""
    + STEP.format(loss="F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())"),
    OWN_RUN: """
model = nn.Sequential(convolutions(3, 32, 64, 64), nn.Linear(64, 10))
model.requires_grad_(False)
model[0][0].requires_grad_(True)
optimizer = torch.optim.AdamW(model[0][0].parameters())
"""
    + STEP.format(loss="F.cross_entropy(model(images), labels)"),
    "cacheable-prefix": """
model = nn.Sequential(*convolutions(3, 32, 64, 64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
model[:8].requires_grad_(False)
optimizer = torch.optim.AdamW(model[8:].parameters())
"""
    + STEP.format(loss="F.cross_entropy(model(images), labels)"),
}
COLUMNS = (
    "rule", "figure", "now", "fixed", "saves: predicted", "really run", "of it page faults", "machine's pace",
    "stated error", "holds",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One figure of one fix: what was said and what ran, before and after. FLOPs, bytes or seconds.

    ``faults_now`` and ``faults_fixed``: what page faults took of the steps that ran. ``pace``: times as long a
    reference kernel took then as when the ops were timed; 1 where the figure is none of time.
    """

    rule: str
    figure: str
    now: float
    fixed: float
    measured_now: float
    measured_fixed: float
    stated_error: float
    faults_now: float
    faults_fixed: float
    pace: float = 1.0

    @property
    def predicted(self) -> float:
        return self.now - self.fixed

    @property
    def measured(self) -> float:
        return self.measured_now - self.measured_fixed

    @property
    def faults(self) -> float:
        """Of what was saved, what page faults took: no prediction has them, but its stated error has."""
        return self.faults_now - self.faults_fixed

    @property
    def holds(self) -> bool:
        """Counts are what was said, before and after; seconds saved within the error of both predictions."""
        if not self.stated_error:
            return (self.now, self.fixed) == (self.measured_now, self.measured_fixed)
        return abs(self.predicted * self.pace - self.measured) <= self.stated_error * self.pace


def watched(path: Path) -> Watch:
    """Watch a script, and time its ops."""
    script, seen = Script(str(path), []), Watch(str(path), time=True)
    with seen:
        script.run(seen.close)
    return seen


def _timed_at(seen: Watch) -> float:
    """Seconds of the reference kernel when the findings' ops were timed."""
    assert seen.now is not None
    calibration = seen.now.trace.calibration
    assert calibration is not None
    return calibration.reference_seconds


def mended(path: Path, finding: Finding) -> Path:
    """The script with the fix where the report says."""
    lines, fix = path.read_text(encoding="utf-8").splitlines(), finding.fix
    at = fix.line - 1
    if fix.replaces:
        lines[at] = lines[at].replace(fix.replaces, fix.code)
    else:
        indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
        lines[at:at] = textwrap.indent(fix.code, indent).splitlines()
    result = path.with_name("mended.py")
    result.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return result


def rows_of(rule: str, rounds: int) -> Iterator[Row]:
    """FLOPs, kept bytes and seconds of one rule's script, before and after."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.py"
        path.write_text(HEAD + SCRIPTS[rule], encoding="utf-8")
        seen = watched(path)
        (finding,) = (each for each in seen.findings if each.rule == rule)
        timed_at = _timed_at(seen)
        after = mended(path, finding)
        assert rule not in [each.rule for each in watched(after).findings], f"{rule} is found after its fix as well"
        own_run = rule == OWN_RUN
        paths = (path, path if own_run else after)
        cases = [_case(each, "train-only" if own_run and n else "freeze") for n, each in enumerate(paths)]
        outcomes = measure_cases(
            [Source(str(each)) for each in paths], cases, rounds=rounds, threads=torch.get_num_threads(),
            reference=Reference(torch.device("cpu")),
        )  # fmt: skip
    before, fixed = (outcome.measured for outcome in outcomes)
    assert before is not None, outcomes[0].error
    assert fixed is not None, outcomes[1].error
    assert finding.now is not None
    assert finding.fixed is not None
    assert finding.now.seconds_error is not None
    assert finding.fixed.seconds_error is not None
    error = math.hypot(finding.now.seconds_error, finding.fixed.seconds_error)
    said, ran = (_figures(each) for each in (finding.now, finding.fixed)), (_ran(before), _ran(fixed))
    first, second = said
    assert before.reference_seconds is not None
    assert fixed.reference_seconds is not None
    pace = (before.reference_seconds + fixed.reference_seconds) / 2 / timed_at
    for figure, now in first.items():
        in_time = figure == "step_seconds"
        besides = (error, before.fault_seconds, fixed.fault_seconds, pace) if in_time else (0.0, 0.0, 0.0, 1.0)
        yield Row(rule, figure, now, second[figure], ran[0][figure], ran[1][figure], *besides)


def _case(path: Path, method: str) -> Case:
    """What trains in a script."""
    model = targets.load(str(path)).model
    return Case.of([name for name, p in model.named_parameters() if p.requires_grad], method)


def _figures(figures: Figures) -> dict[str, float]:
    assert figures.step_seconds is not None
    return {
        "step_flops": figures.step_flops, "saved_bytes": figures.saved_bytes, "step_seconds": figures.step_seconds,
    }  # fmt: skip


def _ran(found: Measured) -> dict[str, float]:
    return {
        "step_flops": (found.forward_flops or 0) + (found.backward_flops or 0),
        "saved_bytes": found.saved_bytes or 0,
        "step_seconds": found.step_seconds,
    }


def cells(row: Row) -> tuple[str, ...]:
    """A row as text: milliseconds, mega-FLOPs, MiB."""
    unit, name = {"step_seconds": (1e-3, "ms"), "step_flops": (1e6, "MFLOP"), "saved_bytes": (2**20, "MiB")}[row.figure]

    def text(value: float) -> str:
        return f"{value / unit:,.2f} {name}"

    besides = (text(row.faults), f"{row.pace:.2f}", text(row.stated_error)) if row.stated_error else ("", "", "exact")
    values = (row.now, row.fixed, row.predicted, row.measured)
    return (row.rule, row.figure, *map(text, values), *besides, "yes" if row.holds else "no")


def markdown(rows: Sequence[Row]) -> str:
    """The result as it is kept."""
    table = [COLUMNS, ("---",) * len(COLUMNS), *map(cells, rows)]
    return "\n".join(
        [
            "# What fixes save, predicted and really run", "", "`python -m benchmarks.fixes --save`", "",
            *conditions(), f"{sum(row.holds for row in rows)} of {len(rows)} hold.", "",
            *(f"| {' | '.join(line)} |" for line in table), "",
        ]
    )  # fmt: skip


def main() -> None:
    """Watch, mend, run, print, and save if asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fixes", description="What fixes save, really run.")
    parser.add_argument("rules", nargs="*", choices=[[], *SCRIPTS])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", action="store_true")
    asked = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    rows: list[Row] = []
    for rule in asked.rules or SCRIPTS:
        print(rule, flush=True)
        rows += rows_of(rule, asked.rounds)
    print(markdown(rows))
    if asked.save:
        (HERE / "results" / "fixes.md").write_text(markdown(rows), encoding="utf-8")
        (HERE / "results" / "fixes.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
