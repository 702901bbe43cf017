"""Plans really run: does a step stay within the budget it was planned for? ``python -m benchmarks.plans [--save]``.

Networks of `benchmarks.models` up to BERT-base's size, each planned for seven budgets, calibrated before; importance is
the same seeded draw as in `benchmarks.planning`. Each plan's step is run in fresh processes, turn by turn: the FLOPs
that torch dispatches, the bytes that autograd keeps, the peak that torch's allocator reports, and seconds. Counts have
to be within the budget, and the peak within it and the error stated for it; seconds within the budget and the
uncertainty that comes with the prediction, both for the machine as fast as it was when the plan ran: a reference
kernel is looked at around each turn, as it is between the ops that are timed. ``--save`` writes
``benchmarks/results/plans.md`` and ``.json``.
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

import frostline as fl
from benchmarks import models
from benchmarks.costing import conditions
from benchmarks.planning import drawn_importance
from frostline.measuring.case import Case, Source
from frostline.measuring.rounds import measure_cases
from frostline.probing.timings import Reference

HERE = Path(__file__).parent
NETWORKS = ("minilm", "efficientnet_lite0", "unet", "llama", "bert_base")
METHOD = "train-only"
BUDGETS = (
    ("step_flops", "50%"), ("step_flops", "75%"), ("saved_bytes", "40%"), ("peak_bytes", "70%"),
    ("step_seconds", "50%"), ("step_seconds", "65%"), ("step_seconds", "80%"),
)  # fmt: skip
PEAK_ERROR = 0.03  # README: what a predicted peak may be off
HEAD = ("network", "budget", "of it: predicted", "really run", "machine's pace", "allowed for error", "within")


@dataclass(frozen=True)
class Row:
    """One plan. FLOPs, bytes or seconds; ``stated_error`` in the same unit, 0 where counts are exact.

    ``pace``: times as long the machine took for a reference kernel when the network's plans ran, turn by turn, as when
    they were predicted; 1 where the figure is none of time.
    """

    network: str
    figure: str
    asked: str
    limit: float
    predicted: float
    measured: float
    stated_error: float
    pace: float = 1.0

    @property
    def holds(self) -> bool:
        """Within the budget; counts are also what was said, to the last one."""
        as_said = self.stated_error > 0 or self.measured == self.predicted
        return (
            as_said and self.predicted <= self.limit and self.measured <= (self.limit + self.stated_error) * self.pace
        )


def rows_of(network: str, rounds: int | None) -> Iterator[Row]:
    """Every budget of one network."""
    model, inputs, loss = getattr(models, network)()
    trace = fl.trace(model, inputs, loss)
    trace.calibrate()
    importance = drawn_importance(list(trace.parameters))
    plans, asked = [], []
    for figure, share in BUDGETS:
        try:
            plans.append(fl.plan(trace, {figure: share}, importance, method=METHOD))
        except fl.FrostlineError as error:
            print(f"{network}, {share} of {figure}: {error}", flush=True)
            continue
        asked.append((figure, share))
    source = Source(f"{HERE / 'models.py'}:{network}")
    cases = [Case.of(plan.subset, METHOD) for plan in plans]
    assert trace.calibration is not None
    timed_at = trace.calibration.reference_seconds
    outcomes = measure_cases(
        source, cases, rounds=rounds, threads=torch.get_num_threads(), together=True, reference=Reference(trace.device)
    )
    looks = [each.measured.reference_seconds for each in outcomes if each.measured is not None]
    pace = statistics.median(look for look in looks if look is not None) / timed_at  # (turn by turn: one for all)
    for (figure, share), plan, outcome in zip(asked, plans, outcomes, strict=True):
        found, cost = outcome.measured, trace.cost(plan, method=METHOD)
        if found is None:
            raise SystemExit(f"{network}, {share} of {figure}: {outcome.error}")
        assert cost.seconds is not None
        measured = {
            "step_flops": (found.forward_flops or 0) + (found.backward_flops or 0),
            "saved_bytes": found.saved_bytes or 0,
            "peak_bytes": found.peak_bytes or 0,
            "step_seconds": found.step_seconds,
        }[figure]
        stated = {"peak_bytes": PEAK_ERROR * cost.peak_bytes, "step_seconds": cost.seconds.uncertainty}
        error, in_time = stated.get(figure, 0.0), figure == "step_seconds"
        limit, predicted = plan.budget[figure], getattr(cost, figure)
        yield Row(network, figure, share, limit, predicted, measured, error, pace if in_time else 1.0)


def markdown(rows: Sequence[Row]) -> str:
    """The result as it is kept."""
    lines = [
        "# Plans, really run", "", "`python -m benchmarks.plans --save`", "", *conditions(),
        "Method train-only. Shares are of the budget. Pace: times as long a reference kernel took around the runs as "
        "when the ops were timed; budgets of seconds are for a machine as fast as then.", "",
        f"{sum(row.holds for row in rows)} of {len(rows)} hold.", "",
        "| " + " | ".join(HEAD) + " |", "|" + " --- |" * len(HEAD),
    ]  # fmt: skip
    for row in rows:
        allowed = f"{row.stated_error / row.limit:.1%}" if row.stated_error else "exact"
        shares = f"{row.predicted / row.limit:.2%} | {row.measured / row.limit:.2%}"
        pace = f"{row.pace:.2f}" if row.figure == "step_seconds" else ""
        held = "yes" if row.holds else "no"
        lines.append(f"| {row.network} | {row.asked} of {row.figure} | {shares} | {pace} | {allowed} | {held} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Plan, run, print, and save if asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plans", description="Plans, really run.")
    parser.add_argument("networks", nargs="*", choices=[[], *NETWORKS])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true")
    asked = parser.parse_args()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    rows: list[Row] = []
    for network in asked.networks or NETWORKS:
        print(network, flush=True)
        rows += rows_of(network, asked.rounds)
    print(markdown(rows))
    if asked.save:
        (HERE / "results" / "plans.md").write_text(markdown(rows), encoding="utf-8")
        (HERE / "results" / "plans.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()
