"""The wall clock of single steps, split into phases."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from frostline.measuring.loop import PHASES, Loop
from frostline.probing.page_faults import page_faults, seconds_per_fault

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

Clock = Callable[[], float]
SHORT_TURN_SECONDS = 0.05
"""A turn of a fast loop takes as many steps as fit in this, so that its median is of more than one."""
LONG_STEP_SECONDS = 0.5
"""From here on the step before the clock starts is left out: a cold cache no longer shows."""


@dataclass(frozen=True)
class Turn:
    """Seconds of one turn, each the median of its steps; on an accelerator the phases are the device's own.

    ``interruptions``: how often a second the system took a processor away from a thread of this process, to give it to
    another. ``page_faults``: how many pages of memory a step took anew from the system, and ``fault_seconds``: about
    how long that took. All are 0 where the system does not say.
    """

    step: float
    forward: float
    backward: float
    optimizer: float
    interruptions: float = 0.0
    page_faults: float = 0.0
    fault_seconds: float = 0.0


def take_turn(loop: Loop, settling: int, steps: int, clock: Clock = time.perf_counter) -> Turn:
    """Run ``settling`` steps off the clock and ``steps`` on it; Python's collector runs before, not inside."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        for _ in range(settling):
            loop.step(_ignore)
        before, faults_before = _interruptions(), page_faults()
        taken = [_timed(loop, clock) for _ in range(steps)]
        interrupted, faults = _interruptions() - before, (page_faults() - faults_before) / steps
    finally:
        if enabled:
            gc.enable()
    step, forward, backward, optimizer = (statistics.median(column) for column in zip(*taken, strict=True))
    interruptions = interrupted / sum(seconds for seconds, *_ in taken)
    return Turn(step, forward, backward, optimizer, interruptions, faults, faults * seconds_per_fault())


def _interruptions() -> int:
    """How often so far a thread of this process lost its processor against its will."""
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def turn_size(step_seconds: float) -> tuple[int, int]:
    """How many steps of this length a turn takes off the clock, and on it.

    >>> turn_size(0.001), turn_size(0.02), turn_size(2.0)
    ((1, 25), (1, 2), (0, 1))
    """
    settling = 0 if step_seconds >= LONG_STEP_SECONDS else 1
    return settling, max(1, min(25, int(SHORT_TURN_SECONDS / max(step_seconds, 1e-9))))


def _ignore(phase: str, loss: Tensor) -> None:
    pass


def _timed(loop: Loop, clock: Clock) -> tuple[float, float, float, float]:
    device = next(iter(loop.parameters.values())).device
    return _on_cpu(loop, clock) if device.type == "cpu" else _on_accelerator(loop, clock, device)


def _on_cpu(loop: Loop, clock: Clock) -> tuple[float, float, float, float]:
    ends: list[float] = []
    start = clock()
    loop.step(lambda phase, loss: ends.append(clock()))
    stop = clock()
    forward, backward, optimizer = ends
    return stop - start, forward - start, backward - forward, optimizer - backward


def _on_accelerator(loop: Loop, clock: Clock, device: torch.device) -> tuple[float, float, float, float]:
    """The device is waited for before and after the step, not inside: events part it into phases."""
    events = [torch.Event(device, enable_timing=True) for _ in range(1 + len(PHASES))]
    rest = iter(events[1:])
    torch.accelerator.synchronize(device)
    start = clock()
    events[0].record()
    loop.step(lambda phase, loss: next(rest).record())
    torch.accelerator.synchronize(device)
    stop = clock()
    phases = [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(events)]
    return stop - start, phases[0], phases[1], phases[2]
