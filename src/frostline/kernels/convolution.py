"""Convolutions, of any dimension, transposed or not: the input is read for grad_weight, the weight for grad_input."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .lean import replaces
from .leaving_out import LeaveOut


@replaces("convolution")
def convolution(_op: Any, input: Tensor, weight: Tensor, *_how: Any) -> Any:
    unread = [t for t, other in ((input, weight), (weight, input)) if not other.requires_grad]
    return LeaveOut(*unread) if unread else NotImplemented
