"""Doing things that no mode sees: modes watch what the user's model does, not what we keep for it."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

_NOTHING = nullcontext()


def unseen() -> AbstractContextManager[Any]:
    """Without the dispatch modes that are on; fake tensors still go to their own mode."""
    return _disable_current_modes() if torch._C._len_torch_dispatch_stack() else _NOTHING


def aside(tensor: Tensor) -> AbstractContextManager[Any]:
    """Where tensors may be made to go with ``tensor``, real or fake: unseen, below autograd."""
    below: AbstractContextManager[Any] = torch._C._AutoDispatchBelowAutograd()
    mode = tensor.fake_mode if isinstance(tensor, FakeTensor) else None
    if not (mode or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()):
        return below
    stack = ExitStack()
    stack.enter_context(torch._C.DisableTorchFunction())
    stack.enter_context(unseen())
    stack.enter_context(below)
    if mode is not None:
        stack.enter_context(mode)
    return stack
