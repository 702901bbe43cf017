"""The truth about peak memory: the events of torch's own allocator, read off the profiler."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from tests.cases import DEVICE, Case
from tests.truth.reference import Method, Unreachable, _run, _set_flags
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Peak:
    """``standing``: bytes there before the step; ``events``: what the allocator gave and took, in order."""

    standing: int
    events: tuple[int, ...]

    @property
    def peak_bytes(self) -> int:
        level = top = 0
        for nbytes in self.events:
            level += nbytes
            top = max(top, level)
        return self.standing + top


def measure_peak(case: Case, train: Collection[str], method: Method) -> Peak:
    """Run three steps of a fresh copy of ``case``, the last of them watched.

    Raises:
        Unreachable: nothing of the subset gets a gradient.
    """
    copy = case.fresh()
    model = copy.model
    trained = _set_flags(model, train, method)
    optimizer = torch.optim.AdamW(trained, lr=1e-9)

    def step() -> None:
        loss = copy.run()
        if not loss.requires_grad:
            raise Unreachable(f"the loss requires no grad with {sorted(train)} by {method}")
        loss.backward(inputs=trained if method == "backward-inputs" else None)
        optimizer.step()
        optimizer.zero_grad()

    with _run(model, train, method):
        return _third(step, model, optimizer, copy)


def _third(step: Callable[[], None], model: torch.nn.Module, optimizer: torch.optim.Optimizer, copy: Case) -> Peak:
    for _ in range(2):
        step()
    standing = _bytes(
        [
            *model.parameters(),
            *model.buffers(),
            *(p.grad for p in model.parameters() if p.grad is not None),
            *(t for state in optimizer.state.values() for t in state.values()),
            *torch.utils._pytree.tree_leaves(copy.inputs),
        ]
    )
    return Peak(standing, _events(step))


def allocated_peak(run: Callable[[], object]) -> int:
    """The most bytes that ``run`` allocates at a time."""
    return Peak(0, _events(run)).peak_bytes


def _events(run: Callable[[], object]) -> tuple[int, ...]:
    if DEVICE != "cpu":  # its allocator has counters
        torch.accelerator.synchronize()
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        run()
        torch.accelerator.synchronize()
        return (torch.accelerator.max_memory_allocated() - before,)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as watched:
        run()
    found = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    found.sort(key=lambda event: event.start_ns())
    return tuple(event.nbytes() for event in found)


def _bytes(values: list[object]) -> int:
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in values if isinstance(t, torch.Tensor)}
    return sum(storages.values())
