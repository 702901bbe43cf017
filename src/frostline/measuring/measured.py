"""What running a case gave."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from frostline.measuring.case import Case


@dataclass(frozen=True)
class Measured:
    """One case, run.

    Attributes:
        turns: seconds of a step, one for each round (the median of that turn's steps).
        forward_turns, backward_turns, optimizer_turns: the parts of each, in the same order.
        interruptions: how often a second a thread lost its processor to something else; the median of the turns.
        page_faults: pages of memory that a step took anew from the system; the median of the turns. ``fault_seconds``:
            about how long that took.
        reference_seconds: what a reference kernel took around the turns, the median; None where it was not looked at.
        peak_bytes: the most that was allocated at one time in a step, in steady state; None where the device does not
            say. With ``baseline_bytes`` (what there was before the step, by kind), ``at_loss_bytes`` (above it, when
            the loss returned), ``peak_phase`` and ``timeline``: see `frostline.measuring.memory.Memory`.
        saved_bytes, forward_flops, backward_flops, uncounted: see `frostline.measuring.counting.Counts`.
    """

    turns: tuple[float, ...]
    forward_turns: tuple[float, ...]
    backward_turns: tuple[float, ...]
    optimizer_turns: tuple[float, ...]
    interruptions: float = 0.0
    peak_bytes: int | None = None
    at_loss_bytes: int | None = None
    saved_bytes: int | None = None
    forward_flops: int | None = None
    backward_flops: int | None = None
    uncounted: tuple[str, ...] = ()
    peak_phase: str = ""
    baseline_bytes: Mapping[str, int] = field(default_factory=dict)
    timeline: tuple[int, ...] = field(default=(), repr=False)
    phase_ends: Mapping[str, int] = field(default_factory=dict, repr=False)
    page_faults: float = 0.0
    fault_seconds: float = 0.0
    reference_seconds: float | None = None

    @property
    def step_seconds(self) -> float:
        """The median over rounds."""
        return statistics.median(self.turns)

    @property
    def spread_seconds(self) -> float:
        """Half the distance between the quartiles of the rounds."""
        return spread(self.turns)

    @property
    def forward_seconds(self) -> float:
        return statistics.median(self.forward_turns)

    @property
    def backward_seconds(self) -> float:
        return statistics.median(self.backward_turns)

    @property
    def optimizer_seconds(self) -> float:
        """The optimizer's step and ``zero_grad``."""
        return statistics.median(self.optimizer_turns)

    @classmethod
    def of(cls, turns: Sequence[Mapping[str, float]], examined: Mapping[str, Any] | None) -> Measured:
        """From a worker's answers."""
        columns = {
            phase: tuple(turn[phase] for turn in turns) for phase in ("step", "forward", "backward", "optimizer")
        }
        looks = [turn["reference"] for turn in turns if "reference" in turn]
        found = dict(examined or {})
        memory = found.get("memory") or {}
        return cls(
            columns["step"],
            columns["forward"],
            columns["backward"],
            columns["optimizer"],
            **{
                name: statistics.median(turn[name] for turn in turns)
                for name in ("interruptions", "page_faults", "fault_seconds")
            },
            reference_seconds=statistics.median(looks) if looks else None,
            peak_bytes=memory.get("peak_bytes"),
            at_loss_bytes=memory.get("at_loss_bytes"),
            saved_bytes=found.get("saved_bytes"),
            forward_flops=found.get("forward_flops"),
            backward_flops=found.get("backward_flops"),
            uncounted=tuple(found.get("uncounted", ())),
            peak_phase=memory.get("peak_phase", ""),
            baseline_bytes=memory.get("baseline_bytes", {}),
            timeline=tuple(memory.get("timeline", ())),
            phase_ends=memory.get("phase_ends") or {},
        )

    def to_dict(self) -> dict[str, Any]:
        """Every figure, for JSON; the timeline left out."""
        return {
            "step_seconds": self.step_seconds,
            "spread_seconds": self.spread_seconds,
            "forward_seconds": self.forward_seconds,
            "backward_seconds": self.backward_seconds,
            "optimizer_seconds": self.optimizer_seconds,
            "round_seconds": list(self.turns),
            "interruptions_per_second": self.interruptions,
            "page_faults_per_step": self.page_faults,
            "page_fault_seconds": self.fault_seconds,
            "reference_seconds": self.reference_seconds,
            "peak_bytes": self.peak_bytes,
            "peak_phase": self.peak_phase,
            "baseline_bytes": dict(self.baseline_bytes),
            "at_loss_bytes": self.at_loss_bytes,
            "saved_bytes": self.saved_bytes,
            "forward_flops": self.forward_flops,
            "backward_flops": self.backward_flops,
            "uncounted": list(self.uncounted),
        }


@dataclass(frozen=True)
class Outcome:
    """A case and what came of it: ``measured``, or the ``error`` that ended it (``detail``: where it was raised)."""

    case: Case
    measured: Measured | None = None
    error: str = ""
    detail: str = field(default="", repr=False)


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles; 0 of a single value.

    >>> spread([1.0, 2.0, 3.0, 4.0, 5.0])
    1.0
    """
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2
