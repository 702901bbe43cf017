"""One op, run alone on real tensors: how long it takes, and what its kernel takes for itself.

Tensors are made up with the shapes, strides and dtypes of the trace. Inputs are rotated through more memory than the
caches hold, as a step's are by the time an op comes to them. Before a call that is long enough to be timed alone other
memory is read as well: a kernel's scratch is no longer in the caches either when a step comes to its next use.
"""

from __future__ import annotations

import functools
import itertools
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import profile

from frostline.probing.crashes import crash_of
from frostline.tracing.calls import TensorMeta, tensors_in
from frostline.tracing.environment import undisturbed
from frostline.tracing.stand_ins import stand_in

ROTATED_BYTES = 48 << 20  # more than a last-level cache holds
NEAR_BYTES = 8 << 20  # more than all but the last-level cache hold; what is as small as this lies there between two ops
_MOST_SETS = 256
_FEW_SETS = 16  # where each takes memory of its own
_ENOUGH = 0.06  # seconds of calls to collect for one op
_LONG = 1.5  # seconds: what takes this long is not run again only to be sure
_AGREE = 0.1  # of the median: samples that lie this near to it are of the same thing
MOST_SAMPLES = 25
_BETWEEN_BYTES = 28 << 20  # that a step's other ops touch until the same scratch memory is used again
COOLED_SAMPLES = 9  # reading that much takes longer than most calls
_LEFT_BY_FORWARD = ("workspace", "reserve")  # arguments that a kernel trusts to be what its forward left for it
_SAMPLED = 4093  # elements of a result
_SHORT = 2e-4  # seconds; calls shorter than this are timed several at a time
_TOGETHER = 5e-4  # seconds: as many calls are handed to an accelerator at a time
_MOST_AT_A_TIME = 32
_LONGEST_WAIT = 0.05  # seconds
_CYCLES = 2e9  # a second, of the accelerator's clock at its fastest
_CACHES = 3  # of an accelerator: so many times its last-level cache is rotated through


@dataclass(frozen=True)
class Work:
    """An op call to be timed. Tensors in ``args`` and ``kwargs`` are `TensorMeta`.

    ``grad_enabled``: as it runs in the step. No tensor here needs a gradient, but a kernel may ask whether any could.
    ``near``: the tensors, by number, that the step made just before, so that they lie in the last cache still.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad_enabled: bool = False
    near: frozenset[int] = frozenset()

    @property
    def metas(self) -> list[TensorMeta]:
        return list(_metas((self.args, self.kwargs)))

    def nbytes(self, *, near: bool) -> int:
        """Bytes of the tensors that lie near, or of those that come from memory."""
        return sum(meta.nbytes for number, meta in enumerate(self.metas) if (number in self.near) is near)


@dataclass(frozen=True)
class Timing:
    """What one op call takes.

    Attributes:
        seconds: the median of ``num_samples`` calls; ``spread``: half the distance of their quartiles.
        scratch_bytes: the most that the kernel held at a time, its results apart.
        failure: why it could not be run; '' if it was.
        host_seconds: what it takes to hand the call to an accelerator, which ``seconds`` are of; on the CPU 0.
        zeros: the share of its result that it fills up with zeros, having been given fewer elements; at least.
    """

    seconds: float
    spread: float
    scratch_bytes: int
    num_samples: int = 1
    failure: str = ""
    host_seconds: float = 0.0
    zeros: float = 0.0

    @property
    def uncertainty(self) -> float:
        """Of the median, in seconds."""
        return float(self.spread / max(self.num_samples, 1) ** 0.5)


def rotated_bytes(device: torch.device) -> int:
    """What inputs are rotated through: more than the device's caches hold."""
    if device.type != "cuda":
        return ROTATED_BYTES
    return max(ROTATED_BYTES, _CACHES * torch.cuda.get_device_properties(device).L2_cache_size)


def failed(why: str) -> Timing:
    """Of a call that could not be run."""
    return Timing(0.0, 0.0, 0, 0, why)


def reason(error: Exception) -> str:
    """The first line of what an error says."""
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"


class Stopwatch:
    """Times ops on one device.

    Args:
        clock: seconds; injected by tests.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device = device
        self.clock = clock
        self._on_accelerator = device.type not in ("cpu", "meta")

    def time(self, work: Work) -> Timing:
        """Run ``work`` until its time is known. What it raises becomes the timing's ``failure``."""
        left = [a.name for a in work.op._schema.arguments if a.name in _LEFT_BY_FORWARD]
        if left:  # (made up, it would crash the process)
            return failed(f"reads a {left[0]} that only its forward can make")
        crash = crash_of(work.op, work.args)
        if crash:
            return failed(crash)
        with torch.set_grad_enabled(work.grad_enabled), undisturbed():
            try:
                scratch, zeros = self._scratch(work)
                rotation = _Rotation(work, rotated_bytes(self.device))
                samples, host = self._samples(rotation, rotation.cool)
            except Exception as error:  # made-up values that a kernel refuses; no memory
                return failed(reason(error))
        return replace(_summary(samples, host, scratch), zeros=zeros)

    def time_call(self, call: Callable[[], Any], parts: int) -> Timing:
        """Time a call that does the same ``parts`` times: of one of them."""
        samples, host = ([sample / parts for sample in found] for found in self._samples(call))
        return _summary(samples, host, 0)

    def _samples(
        self, call: Callable[[], Any], cool: Callable[[], Any] | None = None
    ) -> tuple[list[float], list[float]]:
        """Seconds of a call, several times, and those of handing it over (none on the CPU).

        Args:
            cool: done, off the clock, before each that is timed alone (on the CPU).
        """
        if self._on_accelerator:
            return self._samples_there(call)
        once = self._timed(call, 1)
        at_a_time = max(1, min(50, int(_SHORT / max(once, 1e-7))))
        samples: list[float] = [once] if once > _LONG else []
        spent = sum(samples)
        cools = cool is not None and at_a_time == 1
        most = min(MOST_SAMPLES, COOLED_SAMPLES) if cools else MOST_SAMPLES
        while len(samples) < most and (spent < _ENOUGH or (spent < _LONG and not _settled(samples))):
            if cool is not None and cools:
                cool()
            seconds = self._timed(call, at_a_time)
            samples.append(seconds / at_a_time)
            spent += seconds
        return samples, []

    def _timed(self, call: Callable[[], Any], times: int) -> float:
        start = self.clock()
        for _ in range(times):
            call()
        return self.clock() - start

    # -- accelerators: two clocks --------------------------------------------------------------------------------------

    def _samples_there(self, call: Callable[[], Any]) -> tuple[list[float], list[float]]:
        """As `_samples`. The device waits until it has the calls, so that it never waits between them."""
        torch.cuda.synchronize(self.device)
        once = max(self._timed(call, 1), self._behind(call, 1, _SHORT)[0], 1e-6)
        at_a_time = max(1, min(_MOST_AT_A_TIME, int(_TOGETHER / once)))
        seconds: list[float] = []
        host: list[float] = []
        spent = 0.0
        while len(seconds) < MOST_SAMPLES and (spent < _ENOUGH or (len(seconds) < 3 and spent < _LONG)):
            torch.cuda.synchronize(self.device)
            host.append(self._timed(call, at_a_time) / at_a_time)
            seconds.append(self._behind(call, at_a_time, _SHORT + 1.5 * host[-1] * at_a_time)[0])
            spent += at_a_time * max(host[-1], seconds[-1])
        return seconds, host

    def _behind(self, call: Callable[[], Any], times: int, head_start: float) -> tuple[float, float]:
        """Seconds of a call on the device once it is let go, and of handing it over meanwhile."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        torch.cuda._sleep(int(min(head_start, _LONGEST_WAIT) * _CYCLES))
        begin.record()
        host = self._timed(call, times)
        end.record()
        torch.cuda.synchronize(self.device)
        return float(begin.elapsed_time(end)) / 1000 / times, host / times

    def _scratch(self, work: Work) -> tuple[int, float]:
        """Bytes the kernel held at most, beyond what it returned; and the share of its result that is filled up."""
        args, kwargs = _Inputs(work, rotated_bytes(self.device)).take(work)
        result, scratch = self.with_scratch(lambda: work.op(*args, **kwargs))
        return scratch, _filled_up(result, sum(meta.numel for meta in work.metas if meta.dtype.is_floating_point))

    def with_scratch(self, call: Callable[[], Any]) -> tuple[Any, int]:
        """What ``call`` returns, and the bytes it held at most beyond that."""
        if self._on_accelerator:
            torch.cuda.synchronize(self.device)
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            result = call()
            torch.cuda.synchronize(self.device)
            held = torch.cuda.memory_allocated(self.device) - before
            return result, max(0, torch.cuda.max_memory_allocated(self.device) - before - max(held, 0))
        with _quiet_profiler(), profile(profile_memory=True, use_kineto=False) as watched:
            result = call()
        found = watched.kineto_results
        events = [] if found is None else [e for e in found.events() if e.name() == "[memory]"]
        events.sort(key=lambda event: event.start_ns())
        level = top = 0
        for event in events:
            level += event.nbytes()
            top = max(top, level)
        return result, max(0, top - max(level, 0))

    def time_replays(self, replay: Callable[[Runner], Any]) -> list[Timing]:
        """Timings of the ops that a replay runs, in order.

        Args:
            replay: runs its ops through the runner it is given; called several times. The first gives the scratch.
        """
        scratches: list[int] = []

        def sizing(op: Any, args: Any, kwargs: Any) -> Any:
            result, scratch = self.with_scratch(lambda: op(*args, **kwargs))
            scratches.append(scratch)
            return result

        replay(sizing)
        samples: list[list[tuple[float, float]]] = [[] for _ in scratches]
        spent = 0.0
        rounds = 0
        while rounds < MOST_SAMPLES and (spent < _ENOUGH or (rounds < 3 and spent < _LONG)):
            taken: list[tuple[float, float]] = []

            def timing(op: Any, args: Any, kwargs: Any, taken: list[tuple[float, float]] = taken) -> Any:
                results: list[Any] = []
                once = functools.partial(lambda op, args, kwargs: results.append(op(*args, **kwargs)), op, args, kwargs)
                taken.append(self._behind(once, 1, _SHORT) if self._on_accelerator else (self._timed(once, 1), 0.0))
                return results[0]

            replay(timing)
            for sample, pair in zip(samples, taken, strict=True):
                sample.append(pair)
            spent += sum(map(sum, taken))
            rounds += 1
        apart = [([seconds for seconds, _ in sample], [host for _, host in sample]) for sample in samples]
        return [_summary(*each, scratch) for each, scratch in zip(apart, scratches, strict=True)]


Runner = Callable[[Any, Any, Any], Any]


def _settled(samples: list[float]) -> bool:
    """Whether three agree with the median: some calls may be those that take their memory from the system."""
    middle = statistics.median(samples or [0.0])
    return sum(abs(sample - middle) <= _AGREE * middle for sample in samples) >= 3


def _filled_up(result: Any, given: int) -> float:
    """The share of a result that its kernel filled up with zeros, having been given ``given`` numbers to put there.

    By a sample. At least so much: indices may name one place twice, and those made up name few.
    """
    dense = isinstance(result, Tensor) and result.layout is torch.strided and result.is_contiguous()
    if not dense or result.numel() <= given:
        return 0.0
    share = 1 - given / result.numel()
    spread = result.as_strided((min(result.numel(), _SAMPLED),), (max(1, result.numel() // _SAMPLED),))
    return share if int((spread == 0).sum()) > share * len(spread) / 2 else 0.0


def _summary(samples: list[float], host: list[float], scratch: int) -> Timing:
    quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
    spread, host_seconds = (quartiles[2] - quartiles[0]) / 2, statistics.median(host or [0.0])
    return Timing(quartiles[1], spread, scratch, len(samples), host_seconds=host_seconds)


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Torch's profiler writes two lines to stderr whenever it is used, unless told not to before its first use."""
    before = os.environ.get("KINETO_LOG_LEVEL")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("KINETO_LOG_LEVEL", None)


class _Rotation:
    """Calls of ``work``, each with the next set of inputs. The last results are kept for a while, so that a result lies
    in memory that was in use before, but not just now.
    """

    def __init__(self, work: Work, rotated: int) -> None:
        self._work = work
        made = _Inputs(work, rotated)
        sets = max(1, min(_MOST_SETS if made.cheap else _FEW_SETS, rotated // max(work.nbytes(near=False), 1)))
        self._rotated = deque(made.take(work) for _ in range(sets))
        args, kwargs = self._rotated[0]
        strided = [each for each in tensors_in(work.op(*args, **kwargs)) if each.layout is torch.strided]
        results = sum(each.untyped_storage().nbytes() for each in strided) if not made.writes else 0
        del strided
        self._kept: deque[Any] = deque(maxlen=min(_MOST_SETS, rotated // (2 * max(results, 1))))
        for _ in range(self._kept.maxlen or 0):
            self()

    def __call__(self) -> None:
        args, kwargs = self._rotated[0]
        self._rotated.rotate(-1)
        self._kept.append(self._work.op(*args, **kwargs))

    def cool(self) -> None:
        """Read what other ops would; then let the caches hold what is near of the next call's."""
        _elsewhere(min(_BETWEEN_BYTES, ROTATED_BYTES)).sum()
        for number, tensor in enumerate(tensors_in(self._rotated[0])):
            if number in self._work.near and tensor.layout is torch.strided:
                tensor.clone()


class _Inputs:
    """Tensors for one op call: random numbers out of memory that is there already, and indices that are in range.

    Memory of its own goes to what an op writes to, and to what does not fit.
    """

    def __init__(self, work: Work, rotated: int) -> None:
        self._arena_bytes = 2 * rotated
        self.bound = _index_bound(work)
        self.writes = work.op._schema.is_mutable
        self.cheap = not self.writes and all(map(_fits_arena, work.metas))
        self._near: dict[int, deque[Tensor]] = {number: deque() for number in work.near}
        self._num_near = max(1, min(_MOST_SETS, NEAR_BYTES // (2 * max(work.nbytes(near=True), 1))))
        self._next = 0

    def take(self, work: Work) -> tuple[Any, Any]:
        """A set of arguments; those that are near come again after a few."""
        numbers = itertools.count()
        return self._of(work.args, numbers), self._of(work.kwargs, numbers)

    def _of(self, value: Any, numbers: Iterator[int]) -> Any:
        if isinstance(value, TensorMeta):
            number = next(numbers)
            near = self._near.get(number)
            if near is None:
                return self._tensor(value)
            near.append(near.popleft() if len(near) == self._num_near else self._tensor(value))
            return near[-1]
        if isinstance(value, (tuple, list)):
            return type(value)(self._of(item, numbers) for item in value)
        if isinstance(value, dict):
            return {key: self._of(item, numbers) for key, item in value.items()}
        return value

    def _tensor(self, meta: TensorMeta) -> Tensor:
        if _fits_arena(meta) and not self.writes and meta.numel:
            extent = 1 + sum((size - 1) * stride for size, stride in zip(meta.shape, meta.stride, strict=True))
            arena = _arena(meta.dtype, meta.device, self._arena_bytes)
            if 2 * extent <= len(arena):
                if self._next + extent > len(arena):
                    self._next = 0
                begin = self._next
                self._next += -(-extent // 64) * 64
                return arena.as_strided(meta.shape, meta.stride, begin)
        tensor = stand_in(meta, real=True)
        if tensor.layout is torch.strided and tensor.numel() and not meta.lazy:
            every = torch.empty(0, dtype=meta.dtype, device=meta.device).set_(tensor.untyped_storage())
            if meta.dtype.is_floating_point:
                every.fill_(0.5)
            elif not meta.dtype.is_complex and meta.dtype is not torch.bool:
                every.random_(0, min(self.bound, torch.iinfo(meta.dtype).max))
        return tensor


def _fits_arena(meta: TensorMeta) -> bool:
    floats = meta.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    return meta.layout is torch.strided and not meta.lazy and floats


@functools.lru_cache(maxsize=2)
def _arena(dtype: torch.dtype, device: str, nbytes: int) -> Tensor:
    """Random numbers between -1 and 1, more than the caches hold. Kept: fresh memory costs more than most ops."""
    drawn = torch.empty(1 << 18, device=device).uniform_(-1, 1).to(dtype)
    return drawn.repeat(max(1, nbytes // drawn.nbytes))


@functools.lru_cache(maxsize=1)
def _elsewhere(nbytes: int) -> Tensor:
    """Memory that nothing else uses."""
    return torch.ones(nbytes // 8, dtype=torch.int64, device="cpu")


def _index_bound(work: Work) -> int:
    """The smallest size among the call's tensors and numbers: an index below it is in range wherever it points."""
    sizes = [size for meta in work.metas for size in meta.shape if size > 1]
    sizes += [value for value in work.args if type(value) is int and value > 1]
    return min(sizes, default=1)


def _metas(value: Any) -> Any:
    if isinstance(value, TensorMeta):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _metas(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _metas(item)
