"""Peak memory of one step: on the CPU from the allocator's own events, on an accelerator from its allocator's counters.

Torch's CPU allocator counts nothing by itself. While a profiler with ``profile_memory=True`` runs, it reports every
block it hands out and takes back, with address and size as asked for; of a block from before the profiler it does not
know the size, and is silent when that one is freed. So the profiler watches two steps: what a step replaces is then
known by the time the second one, which is what is measured, lets go of it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from frostline.measuring.loop import PHASES, Loop
from frostline.probing.storages import storages_of

_MARK = "frostline: "


@dataclass(frozen=True)
class Memory:
    """What one step in steady state (the optimizer has its state, gradients are cleared) had allocated.

    Attributes:
        peak_bytes: the most that was allocated at one time: ``baseline_bytes`` and what the step adds to it.
        baseline_bytes: what there was before the step, by kind: ``parameters``, ``buffers``, ``optimizer``,
            ``gradients`` (those that are not cleared), ``inputs``, ``other`` (what else the step uses, such as the
            targets that a loss brings along) and ``kept`` (left by the step before, such as a module's cache).
        at_loss_bytes: above the baseline when the loss returned (the loss itself included).
        peak_phase: ``"forward"``, ``"backward"`` or ``"optimizer"``.
        timeline: bytes above the baseline after each event of the allocator; empty on an accelerator.
        phase_ends: for each phase the number of events up to its end.
    """

    peak_bytes: int
    baseline_bytes: Mapping[str, int]
    at_loss_bytes: int
    peak_phase: str
    timeline: tuple[int, ...] = ()
    phase_ends: Mapping[str, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "timeline": list(self.timeline)}


def measure_memory(loop: Loop, other: Mapping[int, int]) -> Memory | None:
    """Run steps of ``loop``, which is warm, and find the peak of one of them; None where the device does not say.

    Args:
        other: storages that the step uses and nobody registers, by address, in bytes (`counting.Counts.other`).
    """
    device = next(iter(loop.parameters.values())).device
    if device.type == "cpu":
        return _on_cpu(loop, other)
    return _on_accelerator(loop, other, device)


# -- the CPU: events --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """One block handed out (``nbytes`` > 0) or taken back (< 0) at ``address``; or a mark, which has a name."""

    time: int
    nbytes: int = 0
    address: int = 0
    name: str = ""


def _on_cpu(loop: Loop, other: Mapping[int, int]) -> Memory:
    baseline: dict[str, dict[int, int]] = {}

    def nothing(phase: str, loss: Tensor) -> None:
        pass

    def mark(phase: str, loss: Tensor) -> None:
        _mark(phase)

    gc.collect()
    with _gc_off(), torch.autograd.profiler.profile(use_device=None, profile_memory=True) as profiler:
        loop.step(nothing)
        baseline = _owned(loop, other)
        _mark("start")
        loop.step(mark)
    return _follow(list(_events(profiler.kineto_results.experimental_event_tree())), baseline)


def _mark(name: str) -> None:
    with torch.autograd.profiler.record_function(_MARK + name):
        pass


def _events(tree: Iterable[Any]) -> Iterator[Event]:
    """The allocator's events on the CPU, and our marks, in the order of time."""
    found = []
    stack = list(tree)
    while stack:
        event = stack.pop()
        stack.extend(event.children)
        fields = event.extra_fields
        if type(fields).__name__ == "_ExtraFields_Allocation":
            if fields.device.type == "cpu":
                found.append(Event(event.start_time_ns, fields.alloc_size, fields.ptr))
        elif event.name.startswith(_MARK):
            found.append(Event(event.start_time_ns, name=event.name.removeprefix(_MARK)))
    yield from sorted(found, key=lambda event: event.time)


def _follow(events: list[Event], baseline: dict[str, dict[int, int]]) -> Memory:
    """Add up the events of the second step."""
    start = next(i for i, event in enumerate(events) if event.name == "start")
    blocks = _blocks(events[:start])
    owned = {address for kind in baseline.values() for address in kind}
    kept = {address: nbytes for address, nbytes in blocks.items() if address not in owned}
    baseline = {**baseline, "kept": kept}
    blocks = {address: nbytes for kind in baseline.values() for address, nbytes in kind.items()}
    running, timeline, ends = 0, [0], {}
    for event in events[start + 1 :]:
        if event.name:
            ends[event.name] = len(timeline)
            continue
        if event.nbytes > 0:
            blocks[event.address] = event.nbytes
            running += event.nbytes
        elif event.address in blocks:
            running -= blocks.pop(event.address)
        else:
            continue
        timeline.append(running)
    timeline = timeline[: ends["optimizer"]]
    kinds = {kind: sum(sizes.values()) for kind, sizes in baseline.items()}
    top = max(range(len(timeline)), key=timeline.__getitem__)
    return Memory(
        peak_bytes=sum(kinds.values()) + timeline[top],
        baseline_bytes=kinds,
        at_loss_bytes=timeline[ends["forward"] - 1],
        peak_phase=next(phase for phase in PHASES if top < ends[phase]),
        timeline=tuple(timeline),
        phase_ends=ends,
    )


def _blocks(events: Iterable[Event]) -> dict[int, int]:
    """What is allocated after ``events``, by address."""
    blocks: dict[int, int] = {}
    for event in events:
        if event.nbytes > 0:
            blocks[event.address] = event.nbytes
        else:
            blocks.pop(event.address, None)
    return blocks


def _owned(loop: Loop, other: Mapping[int, int]) -> dict[str, dict[int, int]]:
    """Storages that are there between two steps, each under the first kind that has it, by address."""
    parameters = list(loop.model.parameters())
    kinds: dict[str, Any] = {
        "parameters": parameters,
        "buffers": list(loop.model.buffers()),
        "optimizer": [list(state.values()) for state in loop.optimizer.state.values()],
        "gradients": [p.grad for p in parameters if p.grad is not None],
        "inputs": [loop.args, loop.kwargs],
    }
    seen: set[int] = set()
    found: dict[str, dict[int, int]] = {}
    for kind, values in kinds.items():
        sizes = {s.data_ptr(): s.nbytes() for s in storages_of(values) if s.data_ptr() not in seen}
        seen.update(sizes)
        found[kind] = sizes
    found["other"] = {address: nbytes for address, nbytes in other.items() if address not in seen}
    return found


class _gc_off:  # noqa: N801  used as a statement
    """Python's collector does not run inside: when cycles die would otherwise be a matter of luck."""

    def __enter__(self) -> None:
        self.enabled = gc.isenabled()
        gc.disable()

    def __exit__(self, *exception: object) -> None:
        if self.enabled:
            gc.enable()


# -- accelerators: counters -------------------------------------------------------------------------------------------


def _on_accelerator(loop: Loop, other: Mapping[int, int], device: torch.device) -> Memory | None:
    """Peak of the allocator's own counter. What else lies on the device (``kept``) is in the baseline."""
    counters = torch.accelerator
    marks: dict[str, tuple[int, int]] = {}

    def mark(phase: str, loss: Tensor) -> None:
        counters.synchronize(device)
        marks[phase] = (counters.memory_allocated(device), counters.max_memory_allocated(device))

    gc.collect()
    try:
        counters.synchronize(device)
        counters.reset_peak_memory_stats(device)
        before = counters.memory_allocated(device)
    except (AttributeError, RuntimeError, NotImplementedError):  # an allocator without counters
        return None
    owned = _owned(loop, other)
    with _gc_off():
        loop.step(mark)
    kinds = {kind: sum(sizes.values()) for kind, sizes in owned.items()}
    kinds["kept"] = before - sum(kinds.values())
    peak = marks["optimizer"][1]
    return Memory(
        peak_bytes=peak,
        baseline_bytes=kinds,
        at_loss_bytes=marks["forward"][0] - before,
        peak_phase=next(phase for phase in PHASES if marks[phase][1] == peak),
    )
