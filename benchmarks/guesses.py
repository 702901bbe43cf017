"""What training part of a GPT-2 small costs, and how far the usual guesses err: ``python -m benchmarks.guesses``.

"3 x forward" takes a step for three forwards whatever trains. "(2 + r) x forward" charges grad_weight by the share r of
the parameters that train. Both ignore how far back the gradient has to travel.

The table this reproduces (FACTS 1) leaves two things unsaid. They were chosen here so that its digits come out:

- LoRA sits on the queries and values of all 12 blocks, and that of the last 4 trains, so that the frozen updates of the
  other 8 run in the forward as well: 0.5344. Installed in the last 4 blocks only, it is 0.5352.
- The position table has 512 rows, as many as tokens: the first block is then 4.4 % of the parameters. With the 1024 of
  GPT-2 itself it is 4.3 %. The ratios do not depend on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

import frostline as fl
from examples.gpt2 import NUM_BLOCKS, gpt2_small, gpt2_small_lora

_LAST_FOUR = range(NUM_BLOCKS - 4, NUM_BLOCKS)
SUBSETS: dict[str, str | list[str]] = {
    "all": "*",
    "LM head only": "lm_head",
    "last 2 blocks, head frozen": ["blocks.10", "blocks.11"],
    "first block only": "blocks.0",
    "all biases": "*.bias",
}
LORA = {
    "LoRA r=8 on q,v, last 4 blocks": [f"blocks.{n}.attn.{x}.lora_{m}" for n in _LAST_FOUR for x in "qv" for m in "AB"]
}


@dataclass(frozen=True)
class Row:
    """One subset: its share of the parameters, what backward costs, and what the guesses make of the step."""

    name: str
    trained_share: float
    backward_per_forward: float

    @property
    def three_forwards_error(self) -> float:
        """How far "3 x forward" is from the true step: 0.5 is half too much."""
        return 3 / (1 + self.backward_per_forward) - 1

    @property
    def by_share_error(self) -> float:
        """How far "(2 + r) x forward" is from the true step."""
        return (2 + self.trained_share) / (1 + self.backward_per_forward) - 1

    def printed(self) -> tuple[str, str, str, str]:
        """The row's figures as the table prints them."""
        share = f"{self.trained_share:.1%}" if self.trained_share > 0.01 else f"{self.trained_share:.2%}"
        errors = (f"{self.three_forwards_error:+.1%}", f"{self.by_share_error:+.1%}")
        return share, f"{self.backward_per_forward:.4f}", *errors


def rows() -> Iterator[Row]:
    """Cost every subset of the table."""
    for target, subsets in ((gpt2_small, SUBSETS), (gpt2_small_lora, LORA)):
        trace = fl.trace(*target())
        for name, train in subsets.items():
            cost = trace.cost(train)
            share = cost.num_trained / cost.num_parameters
            yield Row(name, share, cost.backward_flops / cost.forward_flops)


def table(found: list[Row]) -> Table:
    """The rows, side by side."""
    title = "GPT-2 small (12 x 768, vocabulary 50257), 1 x 512 tokens, math attention, head not tied"
    out = Table("subset", title=title, box=box.SIMPLE)
    for head in ("trainable", "backward\n/ forward", '"3 x forward"\nerrs', '"(2 + r) x\nforward" errs'):
        out.add_column(head, justify="right", no_wrap=True)
    for row in found:
        out.add_row(row.name, *row.printed())
    return out


if __name__ == "__main__":
    Console(width=110).print(table(list(rows())))
