"""What batch norms keep and no gradient reads.

The input: in eval mode unless the scale trains, else if only the shift does. In eval mode a batch norm is an affine
map; in either, the gradient towards the shift is a sum of gradients. The running statistics: in train mode, where
backward reads those of the batch. A frozen norm's are copies, which nobody else would hold (see `running.buffers`).
"""

from __future__ import annotations

from torch import Tensor

from .lean import leaves_out


@leaves_out("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")
def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    training: bool,
) -> list[str]:
    scale_trains = weight is not None and weight.requires_grad
    unread = [] if scale_trains or (training and input.requires_grad) else ["input"]
    shift_trains = bias is not None and bias.requires_grad
    if training and mean is not None and var is not None and not scale_trains and not shift_trains:
        unread += ["running_mean", "running_var"]
    return unread
