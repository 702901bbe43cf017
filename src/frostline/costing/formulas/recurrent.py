"""Fused recurrent layers (oneDNN on CPU, cuDNN, MIOpen), forward and backward.

Each weight matrix of a layer and direction (``w_ih``, ``w_hh`` and, with a projection, ``w_hr``) is multiplied once
with every token, a zero initial state included; going backward once more for the gradient of its input and once for
its own. So for ``tokens`` = time steps x batch, each of the three costs ``2 * tokens * numel(weight)``. Gates are
element-wise: free by declaration, as are the fused cells, whose products are separate ``mm`` calls.

The oneDNN kernel computes every gradient, wanted or not. Its data gradients are booked so: what flows through ``w_ih``
on ``grad_input``, what flows back in time through ``w_hh`` on ``grad_hx``.

Source: ``aten/src/ATen/native/mkldnn/RNN.cpp``, ``aten/src/ATen/native/cudnn/RNN.cpp``.
"""

from math import prod
from typing import Any

from .registry import Arguments, Count, Outputs, counts, numel


def _num_tokens(inputs: Any) -> int:
    """``(time, batch, feature)``, its first two swapped, or packed ``(token, feature)``."""
    return prod(inputs.shape[:-1])


@counts("aten::mkldnn_rnn_layer")
def mkldnn_flops(a: Arguments, outputs: Outputs) -> Count:
    """One layer in one direction; ``weight0`` is ``w_ih``, ``weight1`` is ``w_hh``."""
    return 2 * _num_tokens(a["input"]) * (numel(a["weight0"]) + numel(a["weight1"]))


@counts("aten::mkldnn_rnn_layer_backward")
def mkldnn_backward_flops(a: Arguments, outputs: Outputs) -> Count:
    """``(grad_input, grad_w_ih, grad_w_hh, grad_b_ih, grad_b_hh, grad_hx, grad_cx)``; here ``weight1`` is ``w_ih``."""
    through_ih, through_hh = (2 * _num_tokens(a["input"]) * numel(a[name]) for name in ("weight1", "weight2"))
    return through_ih, through_ih, through_hh, 0, 0, through_hh, 0


@counts("aten::_cudnn_rnn", "aten::miopen_rnn")
def cudnn_flops(a: Arguments, outputs: Outputs) -> Count:
    """All layers and directions at once. Not checked on a device."""
    return 2 * _num_tokens(a["input"]) * sum(numel(weight) for weight in a["weight"] if len(weight.shape) == 2)


@counts("aten::_cudnn_rnn_backward", "aten::miopen_rnn_backward")
def cudnn_backward_flops(a: Arguments, outputs: Outputs) -> Count:
    """``(grad_input, grad_hx, grad_cx, *grad_weights)``; the data gradients are always computed, weights' by mask.

    Not checked on a device.
    """
    products = [2 * _num_tokens(a["input"]) * numel(w) if len(w.shape) == 2 else 0 for w in a["weight"]]
    through_time = sum(products[1 :: a["weight_stride0"]])  # w_hh comes second for each layer and direction
    through_layers = sum(products) - through_time
    grad_weights = products if a["output_mask"][3] else []
    return through_layers, through_time, 0, *grad_weights
