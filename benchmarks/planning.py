"""What plans win beside the peers' dynamic program: ``python -m benchmarks.planning``.

BERT-base, GPT-2 small and the shapes of OPT-2.7B and Llama 3 8B, none with weights, each at ten budgets of the FLOPs of
a step; importance is a seeded draw. The peers' program (`benchmarks.peers`) sees a network as a chain of tensors in
the order of ``named_parameters()``. It is given the exact figures of such a chain: the gradient of each tensor, and how
much further the gradient has to be passed for it. What either chooses is costed by frostline on the true graph; of
BERT-base the step of every plan is run once more on fake tensors under torch's own FLOP counter, and has to agree.

``--quick`` takes BERT-base and three budgets; ``--save`` writes ``benchmarks/results/planning.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

import frostline as fl
from benchmarks.costing import PROGRESS, Rerun, bert_base, conditions
from benchmarks.peers import STEPS, Chain, chosen_by_chain
from examples.gpt2 import gpt2_small
from examples.llama import llama_3_8b

RESULTS = Path(__file__).parent / "results"
SEED = 0
BUDGETS = (0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of the backward's FLOPs; the forward is paid anyway
SECONDS = {"BERT-base": 5, "GPT-2 small": 5, "OPT-2.7B shape": 10, "Llama 3 8B shape": 10}  # what a plan may take
GAP = 1e-3


def opt_2_7b() -> tuple[nn.Module, dict[str, Tensor]]:
    """The shape of OPT-2.7B: 32 blocks, 2560 wide; 1 x 512 tokens with labels, bfloat16, train mode."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        hidden_size=2560, num_hidden_layers=32, num_attention_heads=32, ffn_dim=10240, word_embed_proj_dim=2560,
        attn_implementation="eager",
    )  # fmt: skip
    with torch.device("meta"):
        model = OPTForCausalLM(config).to(torch.bfloat16)
    tokens_BT = torch.zeros(1, 512, dtype=torch.int64)
    return model.train(), {"input_ids": tokens_BT, "labels": tokens_BT}


NETWORKS: dict[str, Callable[[], Any]] = {
    "BERT-base": bert_base,
    "GPT-2 small": gpt2_small,
    "OPT-2.7B shape": opt_2_7b,
    "Llama 3 8B shape": llama_3_8b,
}


@dataclass(frozen=True)
class Row:
    """One budget of one network. Importance is a share of all that there is; FLOPs are shares of the budget; seconds
    are the processor's.
    """

    network: str
    tensors: int
    budget: float
    peers_won: float
    peers_flops: float
    peers_seconds: float
    won: float
    flops: float
    gap: float
    seconds: float
    seconds_by_the_clock: float
    counted_by_torch: bool | None

    @property
    def peers_within(self) -> bool:
        return self.peers_flops <= 1

    @property
    def holds(self) -> bool:
        """Whether the plan is within its budget and its time, proven to a thousandth, and not worth less."""
        within = self.flops <= 1 and self.gap <= GAP and self.seconds <= SECONDS[self.network]
        return within and self.counted_by_torch is not False and (self.won >= self.peers_won or not self.peers_within)


def drawn_importance(names: list[str]) -> dict[str, float]:
    """A draw for each tensor whose logarithm is normal: a few matter much, most little."""
    choose = random.Random(SEED)
    return {name: choose.lognormvariate(0, 1) for name in names}


def chain_of(trace: fl.Trace, importance: Mapping[str, float]) -> tuple[Chain, list[str]]:
    """The network as the peers see it, and the names in its order: the last parameter nearest the loss."""
    names = [name for name in reversed(list(trace.parameters)) if _reached(trace, name)]
    passing, own, far = [], [], 0
    for name in names:
        cost = trace.cost([name])
        reach = max(far, cost.grad_input_flops + cost.recompute_flops)
        passing.append(float(reach - far))
        own.append(float(cost.grad_weight_flops))
        far = reach
    return Chain(passing, own, [importance[name] for name in names]), names


def _reached(trace: fl.Trace, name: str) -> bool:
    try:
        trace.cost([name])
    except fl.FrostlineError:
        return False
    return True


def rows_of(network: str, budgets: tuple[float, ...]) -> list[Row]:
    """Every budget of one network, by both."""
    made = NETWORKS[network]()
    trace = fl.trace(*made)
    importance = drawn_importance(list(trace.parameters))
    # (The plans come first: no probe is known to them but those of training everything.)
    everything = trace.cost("@all")
    limits = [everything.forward_flops + int(share * everything.backward_flops) for share in budgets]
    plans, took = [], []
    for limit in limits:
        started = time.process_time()
        plans.append(fl.plan(trace, {"step_flops": limit}, importance))
        took.append(time.process_time() - started)
    chain, names = chain_of(trace, importance)
    total = sum(chain.importance)
    rerun = Rerun(*made) if network == "BERT-base" else None
    rows = []
    done = list(zip(plans, took, strict=True))
    for plan, seconds in track(done, network, console=PROGRESS, refresh_per_second=1):
        budget = int(plan.budget["step_flops"])
        started = time.process_time()
        quantised, kept = chain.quantised()
        limit = int((budget - everything.forward_flops) / everything.backward_flops * kept * STEPS)
        chosen = [names[place] for place in chosen_by_chain(quantised, max(limit, 0))]
        peers_seconds = time.process_time() - started
        theirs = trace.cost(chosen) if chosen else None
        agrees = None if rerun is None else rerun(list(plan.subset.names)) == plan.cost.step_flops
        rows.append(
            Row(
                network=network,
                tensors=len(trace.parameters),
                budget=budget / everything.step_flops,
                peers_won=sum(importance[name] for name in chosen) / total,
                peers_flops=(theirs.step_flops if theirs else everything.forward_flops) / budget,
                peers_seconds=peers_seconds,
                won=plan.objective / total,
                flops=plan.cost.step_flops / budget,
                gap=float("inf") if plan.gap is None else plan.gap,
                seconds=seconds,
                seconds_by_the_clock=plan.solve_seconds,
                counted_by_torch=agrees,
            )
        )
    return rows


def table(rows: list[Row]) -> list[str]:
    """The rows as Markdown."""
    lines = [
        "| network | tensors | budget | peers: importance won | of the budget | time | plan: importance won "
        "| of the budget | gap | time |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        over = "" if row.peers_within else " (over)"
        lines.append(
            f"| {row.network} | {row.tensors} | {row.budget:.0%} | {row.peers_won:.2%} | "
            f"{row.peers_flops:.2%}{over} | {row.peers_seconds:.2f} s | {row.won:.2%} | {row.flops:.2%} | "
            f"{row.gap:.2%} | {row.seconds:.2f} s |"
        )
    return lines


def summary(rows: list[Row]) -> list[str]:
    """What the rows say."""
    said = []
    for network in dict.fromkeys(row.network for row in rows):
        own = [row for row in rows if row.network == network]
        over = sum(not row.peers_within for row in own)
        more = [row.won / row.peers_won - 1 for row in own if row.peers_won]
        held = "holds" if all(row.holds for row in own) else "does not hold"
        said.append(
            f"- {network}: a plan wins {min(more):.1%} to {max(more):.1%} more importance than the peers' choice, "
            f"which is over the budget at {over} of {len(own)}; largest gap {max(row.gap for row in own):.2%}, longest "
            f"plan {max(row.seconds for row in own):.2f} s (at most {GAP:.1%} within {SECONDS[network]} s is asked "
            f"for: {held})."
        )
    counted = [row.counted_by_torch for row in rows if row.counted_by_torch is not None]
    if counted:
        said.append(
            f"- torch's FLOP counter, on a step with the plan's flags, counts what the plan says in {sum(counted)} of "
            f"{len(counted)} plans of BERT-base."
        )
    return said


def markdown(rows: list[Row], command: str) -> str:
    """The result as it is kept."""
    facts = [
        *conditions(),
        "No weights (meta), train mode. BERT-base 8 x 128 tokens, float32; GPT-2 small 1 x 512, float32; OPT-2.7B "
        "shape 1 x 512 and Llama 3 8B shape 1 x 2048, bfloat16. Importance: a log-normal draw a tensor, seed "
        f"{SEED}. Budgets are shares of the FLOPs of a step that trains everything, its forward and "
        "15 to 90 % of its backward. A plan's time is all of `fl.plan`: tables, integer program, and costing again, no "
        "probe remembered on disk (the first plan of a network asks them); tracing is not in it. Times are seconds of "
        "the processor, on which one thread runs, for others stopped this process at times (the .json has those by the "
        "clock as well). The peers' costs are "
        f"quantised to {STEPS} steps, as theirs are, rounded down: so they may come out over the budget. Their program "
        "is vectorised here, and faster than their own.",
    ]
    return "\n".join(["# Planning", "", f"`{command}`", "", *facts, "", *summary(rows), "", *table(rows), ""])


def main() -> None:
    """Measure, print, and save if asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planning", description="Plans beside the peers'.")
    parser.add_argument("--quick", action="store_true", help="BERT-base and three budgets")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/planning.json and .md")
    options = parser.parse_args()
    os.environ["FROSTLINE_CACHE"] = "off"
    rows: list[Row] = []
    for network in ["BERT-base"] if options.quick else NETWORKS:
        rows += rows_of(network, BUDGETS[1::3] if options.quick else BUDGETS)
    text = markdown(rows, "python -m benchmarks.planning" + " --quick" * options.quick)
    print(text)
    if options.save:
        (RESULTS / "planning.md").write_text(text, encoding="utf-8")
        data = {"seed": SEED, "rows": [asdict(row) for row in rows]}
        (RESULTS / "planning.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
