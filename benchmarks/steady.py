"""A machine as fast after as before, for what is predicted first and run then: its speed may change within minutes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from frostline.probing.timings import Reference

Row = TypeVar("Row")
DISTURBED = 0.1  # the reference kernel takes so much more or less
TRIES = 3


def steadily(name: str, run: Callable[[], Iterable[Row]]) -> list[Row]:
    """The rows of a run; of another, at most twice, where the machine's speed after was not what it was before."""
    for _ in range(TRIES):
        before = Reference(torch.device("cpu")).typical()
        rows = list(run())
        change = Reference(torch.device("cpu")).typical() / before
        if abs(change - 1) <= DISTURBED:
            break
        print(f"{name}: the machine takes {change:.0%} of what it took before", flush=True)
    return rows
