"""What is predicted of a cost: the fullest moment of its step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from frostline.costing.entry import numbers_in
from frostline.costing.moment import Moment, Standing
from frostline.costing.optimizers import optimizer_model
from frostline.costing.rerun import Rerun
from frostline.errors import OptimizerError
from frostline.probing.timings import NotTimed

if TYPE_CHECKING:
    from frostline.costing.cost import Cost
    from frostline.costing.memory import Simulation
    from frostline.costing.seconds import StepSeconds

_CUDA_BLOCK = 512  # bytes; source: kMinBlockSize in c10/cuda/CUDACachingAllocator.cpp


def rounding(device: torch.device) -> Callable[[int], int]:
    """What the device's allocator takes for so many bytes: whole blocks on CUDA, as asked for on the CPU."""
    if device.type == "cuda":
        return lambda nbytes: -(-nbytes // _CUDA_BLOCK) * _CUDA_BLOCK
    return int


def peak(cost: Cost) -> Moment:
    """The fullest moment of the step, scratch included once the trace is calibrated."""
    known: tuple[Any, Moment] | None = cost.__dict__.get("_peak")
    calibration = cost.trace.calibration
    if known is None or known[0] is not calibration:
        ledger, forward, backward = cost._flags
        standing = _standing(cost)
        if isinstance(ledger, Rerun):
            found = max(ledger.moments(standing), key=lambda moment: moment.nbytes)
        else:
            found = _simulation(cost).peak(cost._sums.held, forward, backward, standing)
        known = cost.__dict__["_peak"] = (calibration, found)
    return known[1]


def _simulation(cost: Cost) -> Simulation:
    found: Simulation = cost.trace._coster_for(cost.method).simulation
    return found


def timeline(cost: Cost) -> Iterator[Moment]:
    """Every moment of the step, in order."""
    ledger, forward, backward = cost._flags
    if isinstance(ledger, Rerun):
        return ledger.moments(_standing(cost))
    return _simulation(cost).timeline(cost._sums.held, forward, backward, _standing(cost))


def seconds(cost: Cost) -> StepSeconds | None:
    """What the step takes; None until the trace is calibrated, for what nothing runs, and where none may be timed."""
    trace = cost.trace
    calibration = trace.calibration
    if calibration is None or cost.method == "lower-bound":
        return None
    ledger, forward, backward = cost._flags
    clockwork = trace._coster_for(cost.method).clockwork(ledger)
    trained, kept = ({n: trace.parameter_list[n] for n in numbers} for numbers in _with_gradient(cost))
    optimizer = optimizer_model(cost._optimizer)
    try:
        found: StepSeconds = clockwork.step(forward, backward, trained, kept.values(), optimizer, cost._sums.held)
    except NotTimed:
        return None
    return found


def _with_gradient(cost: Cost) -> tuple[list[int], list[int]]:
    """The parameters that get a gradient: those the optimizer owns, and those whose gradients nobody clears."""
    owned = {cost.trace.parameter_numbers[name] for name in cost.subset.names}
    got = list(numbers_in(cost._sums.trained))
    return [n for n in got if n in owned], [n for n in got if n not in owned]


def _standing(cost: Cost) -> Standing:
    trace = cost.trace
    rounded = rounding(trace.device)
    parameters = trace.parameter_list
    sizes = trace.gradient_bytes
    trained, unowned = _with_gradient(cost)
    kept = {n: rounded(sizes[n]) for n in unowned}
    try:
        scratch = optimizer_model(cost._optimizer).scratch_bytes([parameters[n] for n in trained], trace.device)
    except OptimizerError:  # its step cannot be asked: what it keeps is known all the same
        scratch = 0
    weights = _bytes_of((*parameters, *trace.model.buffers()), rounded)
    tape = trace.tape_on
    there = (tape.inputs | trace.lifetimes.found) - tape.excluded  # (a loss may bring tensors of its own: labels)
    inputs = sum(rounded(tape.recorder.storage_bytes[number]) for number in there)
    return Standing(weights, inputs, cost.optimizer_bytes or 0, kept, sizes, scratch)


def _bytes_of(tensors: tuple[torch.Tensor, ...], rounded: Callable[[int], int]) -> int:
    sizes: dict[int, int] = {}
    for tensor in tensors:
        if tensor.device.type == "meta":
            sizes[id(tensor)] = rounded(tensor.numel() * tensor.element_size())
        elif tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            sizes[storage._cdata] = rounded(storage.nbytes())
    return sum(sizes.values())
