"""Seconds of a step, by a clock that the test winds."""

from __future__ import annotations

import gc
import mmap
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.measuring.networks import inputs, mlp, squares

from frostline.measuring.case import Case
from frostline.measuring.loop import Loop
from frostline.measuring.timing import Turn, take_turn, turn_size
from frostline.probing.page_faults import seconds_per_fault


def test_a_turn_is_the_median_of_its_steps_part_by_part():
    loop = Loop(mlp(), inputs(), squares)
    loop.arrange(Case(("2.weight",)))
    readings = iter(
        [
            *(0.0, 1.0, 3.0, 6.0, 6.0),  # 1 s forward, 2 s backward, 3 s optimizer
            *(10.0, 12.0, 16.0, 21.0, 21.0),  # 2, 4 and 5
            *(30.0, 33.0, 36.0, 40.0, 40.0),  # 3, 3 and 4
        ]
    )
    enabled = []

    def clock() -> float:
        enabled.append(gc.isenabled())
        return next(readings)

    turn = take_turn(loop, settling=2, steps=3, clock=clock)
    assert replace(turn, interruptions=0.0, page_faults=0.0, fault_seconds=0.0) == Turn(10.0, 2.0, 3.0, 4.0)
    assert turn.interruptions >= 0
    assert not any(enabled)
    assert gc.isenabled()


def test_a_slow_step_is_taken_once_and_a_fast_one_often():
    assert turn_size(3.0) == (0, 1)
    assert turn_size(0.1) == (1, 1)
    assert turn_size(1e-5) == (1, 25)


class Mapping(torch.autograd.Function):
    """Takes pages from the system at each step, and gives them back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        with mmap.mmap(-1, 1 << 22) as fresh:
            fresh.write(b"1" * (1 << 22))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


@pytest.mark.skipif(sys.platform == "win32", reason="the system does not say")
def test_pages_taken_anew_are_counted_at_each_step():
    loop = Loop(mlp(), inputs(), lambda out: squares(Mapping.apply(out)))
    loop.arrange(Case(("2.weight",)))
    turn = take_turn(loop, settling=1, steps=3)
    assert turn.page_faults >= 1  # (one is enough for all where pages are huge)
    assert turn.fault_seconds == turn.page_faults * seconds_per_fault() > 0
