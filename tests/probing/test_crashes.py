"""Kernels that crash the process are known, really crash, and are run by no probe."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import frostline as fl
from frostline.probing.crashes import CrashError, crash_of, refuse_crash

BACKWARD = torch.ops.aten.native_group_norm_backward.default
FORMATS = {"contiguous_format": (2, 4, 6, 6), "channels_last": (2, 4, 6, 6), "channels_last_3d": (2, 4, 3, 6, 6)}

REAL_STEP = """
import sys, torch
shape, layout, mask, sliced = eval(sys.argv[1])
x = torch.randn(shape).contiguous(memory_format=getattr(torch, layout))
x = (x[..., ::2] if sliced else x).requires_grad_(mask[0])
weight, bias = (torch.ones(shape[1], requires_grad=asked) for asked in mask[1:])
torch.nn.functional.group_norm(x, 2, weight, bias).square().sum().backward()
print("survived")
"""


def arguments(shape: tuple[int, ...], layout: str, mask: tuple[bool, ...], sliced: bool = False) -> list[object]:
    x = torch.randn(shape).contiguous(memory_format=getattr(torch, layout))
    x = x[..., ::2] if sliced else x
    few = torch.ones(shape[0], 2)
    return [x, x, few, few, torch.ones(shape[1]), *shape[:2], x[0, 0].numel(), 2, list(mask)]


MASKS = [mask for mask in itertools.product([True, False], repeat=3) if any(mask)]


@pytest.mark.parametrize("layout", FORMATS)
def test_what_is_said_to_crash_crashes_and_nothing_else(layout: str):
    """Asked of torch itself: when it is mended there, this fails, and the kernel goes off the list."""
    shape = FORMATS[layout]
    asked = [mask for mask in MASKS if layout == "channels_last" or mask in (MASKS[0], MASKS[-1])]
    for mask, sliced in [*((mask, False) for mask in asked), (MASKS[-1], True)]:
        command = [sys.executable, "-c", REAL_STEP, repr((shape, layout, mask, sliced))]
        survived = "survived" in subprocess.run(command, capture_output=True, text=True, check=False).stdout
        assert survived == (crash_of(BACKWARD, arguments(shape, layout, mask, sliced)) == ""), (mask, sliced)


def test_it_is_refused_on_real_tensors_and_on_no_others():
    args = arguments(FORMATS["channels_last"], "channels_last", (False, True, True))
    with pytest.raises(CrashError, match="group norm in channels_last"):
        refuse_crash(BACKWARD, args)
    with FakeTensorMode() as mode:
        refuse_crash(BACKWARD, [mode.from_tensor(arg) if isinstance(arg, torch.Tensor) else arg for arg in args])
    refuse_crash(torch.ops.aten.add.Tensor, args)


def test_a_model_that_would_crash_for_some_subset_is_costed_and_timed_for_all_others():
    norm = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    model = norm.to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 12, 12).to(memory_format=torch.channels_last)
    trace = fl.trace(model, images, loss="sum")
    crashing = ["1.weight", "3.weight"]
    trace.calibrate()
    assert trace.cost("*").seconds.unknown == {}
    assert trace.cost("3").seconds.unknown == {}
    unknown = trace.cost(crashing).seconds.unknown
    assert list(unknown) == ["aten.native_group_norm_backward.default"]
    assert "crashes" in unknown["aten.native_group_norm_backward.default"]
    bound = trace.cost(crashing, method="lower-bound")
    assert 0 < bound.saved_bytes <= trace.cost(crashing, method="train-only").saved_bytes
