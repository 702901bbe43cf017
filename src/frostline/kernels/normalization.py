"""What batch norms keep and no gradient reads.

The input: in eval mode unless the scale trains, else if only the shift does. In eval mode a batch norm is an affine
map; in either, the gradient towards the shift is a sum of gradients. The running statistics: in train mode, where
backward reads those of the batch. A frozen norm's are copies, which nobody else would hold (see `running.buffers`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .lean import replaces
from .leaving_out import LeaveOut


@replaces("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")
def batch_norm(
    _op: Any,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
    *_how: Any,
) -> Any:
    frozen = not any(t is not None and t.requires_grad for t in (weight, bias))
    unread = []
    if not (weight is not None and weight.requires_grad) and not (training and input.requires_grad):
        unread.append(input)
    if training and frozen and mean is not None and var is not None:
        unread += [mean, var]
    return LeaveOut(*unread) if unread else NotImplemented
