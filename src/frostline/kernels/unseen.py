"""Doing things that no mode sees: modes watch what the user's model does, not what we keep for it."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

_NOTHING = nullcontext()
_num_modes, _num_function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_BelowAutograd: Any = torch._C._AutoDispatchBelowAutograd
_interpreters, _forward_ad = torch._C._functorch.peek_interpreter_stack, torch.autograd.forward_ad


def transforming() -> bool:
    """Whether torch.func or forward-mode differentiation is at work: tensors may be more than their memory."""
    return _interpreters() is not None or _forward_ad._current_level >= 0


def unseen() -> AbstractContextManager[Any]:
    """Without the dispatch modes that are on; fake tensors still go to their own mode."""
    return _disable_current_modes() if _num_modes() else _NOTHING


def aside(tensor: Tensor) -> AbstractContextManager[Any]:
    """Where tensors may be made to go with ``tensor``, real or fake: unseen, below autograd."""
    below: AbstractContextManager[Any] = _BelowAutograd()
    mode = tensor.fake_mode if isinstance(tensor, FakeTensor) else None
    if not (mode or _num_modes() or _num_function_modes()):
        return below
    stack = ExitStack()
    stack.enter_context(torch._C.DisableTorchFunction())
    stack.enter_context(unseen())
    stack.enter_context(below)
    if mode is not None:
        stack.enter_context(mode)
    return stack
