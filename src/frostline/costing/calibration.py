"""``trace.calibrate``: take the time of every op that a subset may need, once per device."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from frostline.costing.engine import Ledger
from frostline.costing.optimizers import optimizer_model
from frostline.costing.overhead import (
    NONE,
    Overhead,
    measured_fresh,
    measured_lean,
    measured_packing,
    measured_phases,
    settle_allocator,
    tiny,
    tiny_input,
)
from frostline.costing.rerun import Rerun
from frostline.costing.seconds import Clockwork
from frostline.errors import FrostlineError
from frostline.kernels import eager_kernels
from frostline.probing.timings import NotTimed, Timings, any_stored
from frostline.tracing.trace import Trace, trace

if TYPE_CHECKING:
    from frostline.costing.cost import Cost

_LEAST = -4e-6  # seconds: an op that C++ calls is spared what Python takes to call it, and no more

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Calibration:
    """What a device was found to take.

    Attributes:
        device, num_threads: what it holds for.
        num_timed: op calls timed for it, as against found on disk.
        failed: op -> why it could not be timed.
        notes: such as other calibrations that do not apply.
    """

    timings: Timings
    overhead: Overhead
    device: str
    num_threads: int
    num_timed: int
    failed: dict[str, str]
    notes: tuple[str, ...]

    @property
    def reference_seconds(self) -> float:
        """What the reference kernel takes on the machine as fast as predictions assume it."""
        return self.timings.reference.typical()


def calibrate(
    traced: Trace,
    costs: list[Cost] | None,
    optimizer: Any,
    progress: Progress | None,
    clock: Callable[[], float] = time.perf_counter,
    *,
    like: Calibration | None = None,
) -> Calibration:
    """See `frostline.tracing.trace.Trace.calibrate`."""
    if traced.device.type not in ("cpu", "cuda"):
        raise FrostlineError(f"no clock for device {str(traced.device)!r}; there is cpu and cuda")
    timings = Timings(traced.device, clock) if like is None else like.timings
    return _calibrated(timings, traced, costs, optimizer, progress, clock)


def recall(traced: Trace, costs: list[Cost], optimizer: Any, like: Calibration | None = None) -> bool:
    """Calibrate by the timings on disk alone, and say whether they tell all of these costs; if not, nothing is done.

    What they do not tell of other costs stays unknown.
    """
    if not any_stored(traced.device):
        return False
    timings = Timings(traced.device, takes=False) if like is None else like.timings
    try:
        traced._coster.settle(_calibrated(timings, traced, costs, optimizer, None, time.perf_counter))
    except NotTimed:
        return False
    return True


@eager_kernels()
def _calibrated(
    timings: Timings,
    traced: Trace,
    costs: list[Cost] | None,
    optimizer: Any,
    progress: Progress | None,
    clock: Callable[[], float],
) -> Calibration:
    settle_allocator(traced.device)
    wanted: dict[str, Callable[[], object]] = {}
    asked = [(Clockwork(ledger, timings, NONE), rows) for ledger, rows in _asked(traced, costs)]
    for clockwork, rows in asked:
        wanted.update(clockwork.tasks(rows))
    model = optimizer_model(optimizer)
    for clockwork, _ in asked[:1]:
        for number, parameter in enumerate(traced.parameter_list):
            if parameter.is_floating_point():
                wanted[f"step {number}"] = functools.partial(clockwork.stepping, model, number, parameter)
    for done, take in enumerate(wanted.values()):
        if progress is not None:
            progress(done, len(wanted))
        take()
    if progress is not None:
        progress(len(wanted), len(wanted))
    failed = {op: why for clockwork, _ in asked for op, why in clockwork.unknown.items()}
    overhead = _overhead(traced.device, timings, clock)
    others = timings.others() if timings.num_timed else []
    notes = tuple(f"timings of another setting are there and were not used: {said}" for said in others)
    threads = torch.get_num_threads()
    return Calibration(timings, overhead, str(traced.device), threads, timings.num_timed, failed, notes)


def _asked(
    traced: Trace, costs: list[Cost] | None
) -> Iterator[tuple[Ledger | Rerun, list[tuple[int, int | None]] | None]]:
    """What answers for the rows, each with their flags; None: for any subset."""
    if costs is None:
        ledger, *_ = traced.cost("@all")._flags
        yield ledger, None
        return
    rows: dict[Ledger | Rerun, list[tuple[int, int | None]]] = {}
    for cost in costs:
        ledger, forward, backward = cost._flags
        rows.setdefault(ledger, []).append((forward, backward))
    yield from rows.items()


def _overhead(device: torch.device, timings: Timings, clock: Callable[[], float]) -> Overhead:
    """Per op call, what the step of a tiny network takes beyond its ops."""
    model = tiny(device)
    traced = trace(model, tiny_input(device), loss="sum")
    clockwork = Clockwork(traced._coster.ledger, timings, NONE)
    cost = traced.cost("@all")
    alone = clockwork.tally(*cost._flags[1:])
    forward, backward, optimizing = measured_phases(device, clock)
    on_cpu = device.type == "cpu"  # else what it takes to hand the ops over: the ops themselves run meanwhile
    forward -= alone.forward if on_cpu else alone.host_forward
    backward -= alone.backward if on_cpu else alone.host_backward
    return Overhead(
        max(_LEAST, forward / alone.forward_ops),
        max(_LEAST, backward / alone.backward_ops),
        optimizing,
        measured_fresh(device, clock),
        measured_packing(device, clock),
        *measured_lean(device, clock),
    )
