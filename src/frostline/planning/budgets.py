"""Budgets: which figure of a step may take how much, absolutely or as a share of training everything."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from frostline.amounts import parse_bytes, parse_count, parse_flops, parse_seconds
from frostline.errors import FrostlineError, PlanError

if TYPE_CHECKING:
    from frostline.costing.cost import Cost

FIGURES = (
    "step_seconds", "step_flops", "backward_flops", "peak_bytes", "saved_bytes", "optimizer_bytes",
    "trainable_parameters",
)  # fmt: skip
"""What a budget may be of."""


@dataclass(frozen=True)
class Budget:
    """What a figure of the step may take at most; ``asked`` is how the caller wrote it."""

    figure: str
    limit: float
    asked: str

    def allows(self, cost: Cost) -> bool:
        return spent(cost, self.figure) <= self.limit


def spent(cost: Cost, figure: str) -> float:
    """A figure of a cost; infinite where it is not known, which no budget allows."""
    found = cost.num_trained if figure == "trainable_parameters" else getattr(cost, figure)
    return math.inf if found is None else found


def check_figure(figure: object, full: Cost | None = None) -> str:
    """The figure, if there can be a budget of it (for ``full``: and it is known).

    Raises:
        PlanError: it cannot, or needs a calibration first.
    """
    if not isinstance(figure, str) or figure not in FIGURES:
        close = difflib.get_close_matches(str(figure), FIGURES, 1, 0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"there is {', '.join(FIGURES)}"
        raise PlanError(f"no budget is called {figure!r}: {hint}")
    if full is not None and not math.isfinite(spent(full, figure)):
        if figure == "step_seconds":
            raise PlanError(
                "the seconds of a step are not known yet: call trace.calibrate() first (--time measures it)"
            )
        raise PlanError(
            f"{figure} of training everything is not known: {full.basis.get(figure, '')}; choose another optimizer or "
            "another budget"
        )
    return figure


def read_budgets(budget: Mapping[str, Any], full: Cost) -> tuple[Budget, ...]:
    """The budgets that a caller wrote.

    Args:
        budget: figure -> a number, a text such as ``"4 GiB"``, ``"2 TFLOP"``, ``"50 ms"``, or a share, ``"50%"``.
        full: what shares are shares of.

    Raises:
        PlanError: an unknown figure or unit, or an amount that is not above 0.
    """
    if not isinstance(budget, Mapping):
        raise PlanError(f"budget must be a mapping such as {{'step_flops': '50%'}}, got {type(budget).__name__}")
    if not budget:
        raise PlanError(f"the budget is empty: give one or more of {', '.join(FIGURES)}")
    return tuple(
        Budget(check_figure(figure), _limit(figure, asked, full), _spelled(asked)) for figure, asked in budget.items()
    )


def _spelled(asked: Any) -> str:
    return asked.strip() if isinstance(asked, str) else f"{asked:,}"


def _limit(figure: str, asked: Any, full: Cost) -> float:
    what = f"budget {figure}"
    check_figure(figure, full if figure == "step_seconds" or (isinstance(asked, str) and "%" in asked) else None)
    if isinstance(asked, bool) or not isinstance(asked, (str, int, float)):
        raise PlanError(f"{what} must be a number or a text such as '50%', got {asked!r}")
    found = _read(figure, asked, what, full) if isinstance(asked, str) else asked
    if isinstance(asked, str) and found == 0 == spent(full, figure):
        raise PlanError(f"{what} is a share, {asked!r}, of what training everything takes, which is 0: leave it out")
    if not math.isfinite(found) or found <= 0:
        raise PlanError(f"{what} must be a number above 0, got {asked!r}")
    return found if figure == "step_seconds" else math.floor(found)


def _read(figure: str, text: str, what: str, full: Cost) -> float:
    share = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip())
    if share is not None:
        whole = spent(full, figure)
        return whole if float(share[1]) == 100 else whole * float(share[1]) / 100
    try:
        if figure.endswith("_bytes"):
            return parse_bytes(text, what)
        if figure.endswith("_flops"):
            return parse_flops(text, what)
        return parse_seconds(text, what) if figure == "step_seconds" else parse_count(text, what)
    except FrostlineError as error:
        raise PlanError(f"{error} (or a share of training everything: 50%)") from None
