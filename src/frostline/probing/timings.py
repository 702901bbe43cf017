"""Timings remembered: two op calls that look alike are timed once, and kept between runs.

Kept per device, version of torch, machine, number of threads, what the C library is told about memory, and this code.
The machine's speed drifts, so a reference kernel is timed between the ops, and each timing is kept beside what the
reference took just then.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from frostline.probing.disk import Disk, digest, folder
from frostline.probing.page_faults import allocator_settings
from frostline.probing.stopwatch import Runner, Stopwatch, Timing, Work, failed, reason

_BETWEEN = 0.5  # seconds between two looks at the reference
_AT_LEAST = 5  # looks
_COLD_BYTES = 48 << 20  # read before a look
_LOOKS = 3  # as many calls of the reference make a look


def key_of(work: Work) -> str:
    """A name for an op call that is the same in every process."""
    return hashlib.sha256(
        repr((str(work.op), work.args, work.kwargs, work.grad_enabled, sorted(work.near))).encode()
    ).hexdigest()


@dataclass(frozen=True)
class _Kept:
    timing: Timing
    reference: float  # seconds of the reference kernel at that time


class Reference:
    """How fast the machine is just now: the seconds of one kernel that computes and one that moves memory."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device = device
        self.clock = clock
        self.looks: list[float] = []
        self._last = -1e9
        self._cold = torch.ones(_COLD_BYTES // 4, device=device)
        self._matrix = torch.ones(384, 384, device=device)
        self._vector = torch.ones(1 << 20, device=device)
        self._into = torch.empty(1 << 20, device=device)

    def look(self, *, always: bool = False) -> float:
        """Seconds of the reference, looked at again if the last look was a while ago."""
        if not self.looks or always or self.clock() - self._last > _BETWEEN:
            # (The fastest: how fast the machine is, not what else it does just now. One look after the other would find
            # it faster, by 8 % here, than a look does between ops.)
            self._cold.sum()
            self.looks.append(min(self._once() for _ in range(_LOOKS)))
            self._last = self.clock()
        return self.looks[-1]

    def typical(self) -> float:
        """The median of the looks since this object was made; at least a few are taken."""
        while len(self.looks) < _AT_LEAST:
            self.look(always=True)
        return statistics.median(self.looks)

    def _once(self) -> float:
        self._wait()
        start = self.clock()
        torch.mm(self._matrix, self._matrix)
        torch.add(self._vector, 1.0, out=self._into)
        self._wait()
        return self.clock() - start

    def _wait(self) -> None:
        if self.device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(self.device)


class NotTimed(LookupError):  # noqa: N818  an answer, not a mistake
    """There is no timing at hand, and none may be taken."""


class Timings:
    """Timings of op calls on one device. Asked for one it does not know, it takes the time.

    Args:
        takes: whether it may; else it raises `NotTimed`.
    """

    def __init__(
        self, device: torch.device, clock: Callable[[], float] = time.perf_counter, *, takes: bool = True
    ) -> None:
        self.device = device
        self.takes = takes
        self.stopwatch = Stopwatch(device, clock)
        self.reference = Reference(device, clock)
        self.num_timed = 0
        self._known: dict[str, _Kept] = {}
        self._disk = _disk(device)

    def known(self, work: Work) -> bool:
        """Whether a timing of it is at hand."""
        return self._recall(key_of(work)) is not None

    def get(self, work: Work) -> Timing:
        """The timing of ``work``, as on the machine as fast as it is now."""
        key = key_of(work)
        kept = self._recall(key)
        if kept is None:
            kept = self._take(key, work)
        return self._now(kept)

    def get_other(self, key: str, take: Callable[[Stopwatch], Timing], *, lasting: bool) -> Timing:
        """The timing kept under ``key``, else what ``take`` finds.

        Args:
            lasting: the key says all there is to say, so that the next process may use the timing.
        """
        kept = self._recall(key)
        if kept is None:
            self._may_take()
            before = self.reference.look()
            try:
                timing = take(self.stopwatch)
            except Exception as error:
                timing = failed(reason(error))
            kept = self._keep(key, timing, (before + self.reference.look()) / 2, lasting=lasting)
        return self._now(kept)

    def _now(self, kept: _Kept) -> Timing:
        """A timing as on the machine as fast as it is now."""
        factor = self.reference.typical() / kept.reference if self.device.type == "cpu" else 1.0
        timing = kept.timing
        return replace(timing, seconds=timing.seconds * factor, spread=timing.spread * factor)

    def take_replays(self, works: Sequence[Work], replay: Callable[[Runner], Any]) -> None:
        """Take the time of ops that only run one after the other, as a replay does: those of ``works``, in order.

        Where it fails torch's own ops are left to be timed one by one, so that only what is to blame has no time.
        """
        self._may_take()
        before = self.reference.look()
        try:
            found = self.stopwatch.time_replays(replay)
            if len(found) != len(works):
                found = [failed("on real tensors other ops run")] * len(works)
        except Exception as error:  # user code, or made-up values that a kernel refuses; no memory
            found = [failed(reason(error))] * len(works)
        after = (before + self.reference.look()) / 2
        for work, timing in zip(works, found, strict=True):
            own = work.op.namespace == "aten"
            if not (own and timing.failure):
                self._keep(key_of(work), timing, after, lasting=own)

    def _may_take(self) -> None:
        if not self.takes:
            raise NotTimed

    def _take(self, key: str, work: Work) -> _Kept:
        self._may_take()
        before = self.reference.look()
        timing = self.stopwatch.time(work)
        lasting = work.op.namespace == "aten"
        return self._keep(key, timing, (before + self.reference.look()) / 2, lasting=lasting)

    def _keep(self, key: str, timing: Timing, reference: float, *, lasting: bool) -> _Kept:
        kept = self._known[key] = _Kept(timing, reference)
        self.num_timed += 1
        if self._disk is not None and lasting and not timing.failure:
            self._disk.put(key, kept)
        return kept

    def _recall(self, key: str) -> _Kept | None:
        kept = self._known.get(key)
        if kept is None and self._disk is not None:
            kept = self._disk.get(key)
            if kept is not None:
                self._known[key] = kept
        if kept is not None and not self.reference.looks:
            self.reference.look()
        return kept

    def others(self) -> list[str]:
        """What else there are timings for, that are not these: of another torch, number of threads or allocator."""
        where = folder()
        if where is None:
            return []
        there = {_said(path.name) for path in where.glob("timings-*.sqlite")}
        return sorted(there - {_said(_name(self.device))})


def any_stored(device: torch.device) -> bool:
    """Whether timings for this device and setting are kept on disk."""
    where = folder()
    return where is not None and (where / _name(device)).exists()


def _dump(kept: _Kept) -> str:
    return json.dumps([asdict(kept.timing), kept.reference])


def _load(text: str) -> _Kept:
    timing, reference = json.loads(text)
    kept = _Kept(Timing(**timing), float(reference))
    if not kept.timing.seconds > 0 or not kept.reference > 0:
        raise ValueError(f"no time: {text}")
    return kept


def _disk(device: torch.device) -> Disk | None:
    where = folder()
    return None if where is None else Disk(Path(where) / _name(device), _dump, _load)


def _name(device: torch.device) -> str:
    torch_version = torch.__version__.replace("-", "_")
    threads = torch.get_num_threads()
    return f"timings-{device.type}-{threads}-{_allocator()}-{torch_version}-{digest('probing', 'kernels')}.sqlite"


def _allocator() -> str:
    """A name for what the environment tells the C library about memory, or which library; ``own`` if it says nothing.

    Memory that it gives back to the system and takes again makes a step slower by up to a third.
    """
    told = allocator_settings()
    return hashlib.sha256(repr(told).encode()).hexdigest()[:8] if told else "own"


def _said(name: str) -> str:
    parts = name.removesuffix(".sqlite").split("-")
    if len(parts) != 6:
        return name
    _, device, threads, allocator, version, _ = parts
    memory = "" if allocator == "own" else f", allocator settings {allocator}"
    return f"{device}, {threads} thread{'' if threads == '1' else 's'}, torch {version}{memory}"
