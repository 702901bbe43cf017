"""Kernels of torch's that crash the process. No probe runs them: what they would tell is unknown, and says why.

A step that needs one crashes as well, with frostline or without it; but a probe also asks for gradients that the user's
step never will.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor

from frostline.tracing.calls import TensorMeta, tensors_in


class CrashError(RuntimeError):
    """Raised in place of a crash."""


def crash_of(op: Any, args: Sequence[Any]) -> str:
    """Why an op would crash the process on such arguments, tensors or `TensorMeta`; '' if it is not known to."""
    asked = _CRASHES.get(op)
    return asked(args) if asked is not None else ""


def refuse_crash(op: Any, args: Sequence[Any]) -> None:
    """Raise `CrashError` where an op would crash. Fake tensors run no kernel."""
    if op in _CRASHES and not any(isinstance(tensor, FakeTensor) for tensor in tensors_in(args)):
        why = crash_of(op, args)
        if why:
            raise CrashError(why)


def _group_norm(args: Sequence[Any]) -> str:
    """Without a gradient of the input, its kernel writes through a null pointer (native/cpu/group_norm_kernel.cpp)."""
    x, mask = args[1], args[-1]
    if torch.device(x.device).type == "cpu" and not mask[0] and any(mask) and _is_channels_last(x):
        return "torch crashes here: group norm in channels_last, where its weight or bias trains and nothing before it"
    return ""


def _is_channels_last(x: Tensor | TensorMeta) -> bool:
    """As the kernel asks: by strides, contiguous or not."""
    stride = x.stride() if isinstance(x, Tensor) else x.stride
    return suggest_memory_format(torch.empty_strided(x.shape, stride, device="meta")) is not torch.contiguous_format


_CRASHES: dict[Any, Callable[[Sequence[Any]], str]] = {
    torch.ops.aten.native_group_norm_backward.default: _group_norm,
}
