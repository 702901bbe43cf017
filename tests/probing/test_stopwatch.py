"""Timing one op call: by an injected clock, on tensors made up to fit it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from frostline.probing.stopwatch import COOLED_SAMPLES, NEAR_BYTES, Stopwatch, Work
from frostline.tracing.calls import TensorMeta

aten: Any = torch.ops.aten
CPU = torch.device("cpu")


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> TensorMeta:
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    return TensorMeta(tuple(shape), tuple(tensor.stride()), dtype, "cpu")


class Ticking:
    """A clock on which every look takes a millisecond."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-3
        return self.now


def test_seconds_are_the_clocks() -> None:
    timing = Stopwatch(CPU, Ticking()).time(Work(aten.mul.Tensor, (meta(4, 4), meta(4, 4)), {}))
    assert timing.seconds == pytest.approx(1e-3)
    assert timing.spread == pytest.approx(0.0, abs=1e-9)
    assert timing.num_samples == COOLED_SAMPLES  # (what is read in between is off the clock)
    assert not timing.failure


def test_calls_that_take_their_memory_anew_are_told_from_the_others() -> None:
    durations = iter([0.4, 0.41, 0.36, *[0.005] * 100])  # the first only says how long a call is

    def clock() -> Iterator[float]:
        now = 0.0
        for duration in durations:
            yield now
            now += duration
            yield now

    timing = Stopwatch(CPU, functools.partial(next, clock())).time(Work(aten.mul.Tensor, (meta(4, 4), meta(4, 4)), {}))
    assert timing.seconds == pytest.approx(0.005)
    assert timing.num_samples == 5


def test_scratch_is_what_a_kernel_holds_beyond_its_results() -> None:
    watch = Stopwatch(CPU, Ticking())
    assert watch.time(Work(aten.mul.Tensor, (meta(64, 64), meta(64, 64)), {})).scratch_bytes == 0
    # 1000 floats, and as many from the negation, before one is left: the sum
    _, scratch = watch.with_scratch(lambda: torch.empty(1000).neg().sum())
    assert scratch == 2 * 4000 - 4


def test_what_lies_near_comes_again_and_what_is_far_does_not() -> None:
    seen: list[tuple[int, int]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op is aten.mul.Tensor:
                seen.append((args[0].data_ptr(), args[1].data_ptr()))
            return op(*args, **(kwargs or {}))

    one_mebibyte = meta(512, 512)
    with Watch():
        Stopwatch(CPU, Ticking()).time(Work(aten.mul.Tensor, (one_mebibyte, one_mebibyte), {}, near=frozenset({1})))
    far, near = ({pair[number] for pair in seen} for number in (0, 1))
    assert len(near) == NEAR_BYTES // (2 * one_mebibyte.nbytes)
    assert len(far) >= 24


def test_an_op_that_fails_says_why_and_nothing_is_raised() -> None:
    timing = Stopwatch(CPU, Ticking()).time(Work(aten.mm.default, (meta(2, 3), meta(2, 3)), {}))
    assert timing.failure.startswith("RuntimeError: mat1 and mat2 shapes cannot be multiplied")
    assert timing.seconds == 0


def test_out_of_memory_is_a_failure_of_that_op() -> None:
    timing = Stopwatch(CPU, Ticking()).time(Work(aten.expand.default, (meta(1), [1 << 60]), {}))
    assert not timing.failure  # a view takes no memory
    huge = Work(aten.zeros.default, ([1 << 46],), {})
    assert "RuntimeError" in Stopwatch(CPU, Ticking()).time(huge).failure


def test_made_up_indices_are_in_range() -> None:
    ids = meta(16, dtype=torch.int64)
    for work in (
        Work(aten.embedding.default, (meta(5, 8), ids), {}),
        Work(aten.embedding_dense_backward.default, (meta(16, 8), ids, 5, -1, False), {}),
        Work(aten.nll_loss_forward.default, (meta(16, 3), ids, None, 1, -100), {}),
        Work(aten.gather.default, (meta(16, 4), 1, meta(16, 4, dtype=torch.int64)), {}),
    ):
        assert not Stopwatch(CPU, Ticking()).time(work).failure


def test_what_an_op_writes_to_is_memory_of_its_own() -> None:
    watch = Stopwatch(CPU, Ticking())
    for _ in range(2):
        assert not watch.time(Work(aten.mul_.Tensor, (meta(32, 32), meta(32, 32)), {})).failure
    read = watch.time(Work(aten.sum.default, (meta(32, 32),), {}))
    assert not read.failure


def test_random_numbers_are_not_drawn_from_the_callers_generator() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Stopwatch(CPU, Ticking()).time(Work(aten.native_dropout.default, (meta(8, 8), 0.5, True), {}))
    assert torch.equal(torch.rand(3), expected)
