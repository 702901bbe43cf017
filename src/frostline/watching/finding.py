"""What a rule found, with its evidence, its price and the way out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

from frostline.costing.cost import Cost


class Level(StrEnum):
    """WRONG: results are not what they seem. WASTE: paid, and thrown away. INFO: worth knowing."""

    WRONG = "WRONG"
    WASTE = "WASTE"
    INFO = "INFO"


@dataclass(frozen=True)
class Figures:
    """What one step costs; ``step_seconds`` is None where nothing was timed.

    ``seconds_error``: how far from it a step may lie, nine times of ten.
    """

    forward_flops: int
    backward_flops: int
    step_flops: int
    saved_bytes: int
    gradient_bytes: int
    step_seconds: float | None
    seconds_error: float | None

    @classmethod
    def of(cls, cost: Cost) -> Figures:
        return cls(
            cost.forward_flops,
            cost.backward_flops,
            cost.step_flops,
            cost.saved_bytes,
            cost.gradient_bytes,
            cost.step_seconds,
            None if cost.seconds is None else cost.seconds.uncertainty,
        )

    def beside(self, fault_seconds: float) -> Figures:
        """These, of steps whose page faults take so long: no prediction has them, so the error has."""
        error = self.seconds_error
        return self if error is None else replace(self, seconds_error=error + fault_seconds)

    def skipping(self, flops: int, seconds: float) -> Figures:
        """These, without a part of the forward."""
        flopless = replace(self, forward_flops=self.forward_flops - flops, step_flops=self.step_flops - flops)
        if not self.step_seconds or self.seconds_error is None:
            return flopless
        left = self.step_seconds - seconds
        return replace(flopless, step_seconds=left, seconds_error=self.seconds_error * left / self.step_seconds)


@dataclass(frozen=True)
class Fix:
    """Code to paste.

    Attributes:
        where: where it goes, in words.
        path, line: the line to put it before, if known.
        replaces: on that line, the text that the code takes the place of; '' where it is put before it.
    """

    code: str
    where: str
    path: str = ""
    line: int = 0
    replaces: str = ""


@dataclass(frozen=True)
class Effect:
    """What a fix does to the step, so that several can be costed together.

    Attributes:
        freezes: ids of the parameters that it freezes.
        trains: names, in the trace, of what trains in their place.
        within: entered while the step is traced again as it is with the fix; None where that is the trace as it is.
        method: by which the step runs.
        skips_flops, skips_seconds: of the forward, what it no longer runs; 0 seconds where they are not known.
    """

    freezes: frozenset[int] = frozenset()
    trains: tuple[str, ...] = ()
    within: Callable[[], AbstractContextManager[None]] | None = None
    method: str = "freeze"
    skips_flops: int = 0
    skips_seconds: float = 0.0


@dataclass(frozen=True)
class Finding:
    """One thing that a rule found.

    Attributes:
        rule: the rule's id; ``docs/watching/RULE.md`` explains it.
        text: one sentence or two, with names.
        place: the line of the cause, ``train.py:12``; '' where it cannot be known.
        parameters, modules: what it is about, by name.
        evidence: what was seen, in values.
        now, fixed: the step as it is and with the fix, from a trace of the very model; None where neither changes or
            the step could not be traced.
        basis: how these figures are known.
        fix: what to do about it.
        fine: when it is no mistake.
        effect: what the fix does to the step's figures.
    """

    rule: str
    level: Level
    text: str
    parameters: tuple[str, ...]
    modules: tuple[str, ...]
    evidence: tuple[str, ...]
    fix: Fix
    fine: str
    place: str = ""
    now: Figures | None = None
    fixed: Figures | None = None
    basis: str = ""
    effect: Effect = field(default=Effect(), repr=False)

    def beside(self, fault_seconds: float) -> Finding:
        """It, with figures that are `Figures.beside` page faults."""
        now, fixed = (None if each is None else each.beside(fault_seconds) for each in (self.now, self.fixed))
        return replace(self, now=now, fixed=fixed)

    def to_dict(self) -> dict[str, Any]:
        data = asdict(replace(self, effect=Effect()))
        del data["effect"]
        return {
            key: str(value) if isinstance(value, Level) else list(value) if isinstance(value, tuple) else value
            for key, value in data.items()
        }
