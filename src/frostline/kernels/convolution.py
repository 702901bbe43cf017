"""Convolutions, of any dimension, transposed or not: the input is read for grad_weight, the weight for grad_input."""

from __future__ import annotations

from torch import Tensor

from .lean import leaves_out


@leaves_out("convolution")
def convolution(input: Tensor, weight: Tensor) -> tuple[str, ...]:
    if weight.requires_grad:
        return () if input.requires_grad else ("weight",)
    return ("input",) if input.requires_grad else ("input", "weight")
