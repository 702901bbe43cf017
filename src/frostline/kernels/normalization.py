"""Batch norms whose input no gradient reads: in eval mode unless the scale trains, else if only the shift does.

In eval mode a batch norm is an affine map; in either, the gradient towards the shift is a sum of gradients.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .lean import replaces
from .leaving_out import LeaveOut


@replaces("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")
def batch_norm(
    _op: Any, input: Tensor, weight: Tensor | None, _bias: Any, _mean: Any, _var: Any, training: bool, *_how: Any
) -> Any:
    reads = (training and input.requires_grad) or (weight is not None and weight.requires_grad)
    return NotImplemented if reads else LeaveOut(input)
