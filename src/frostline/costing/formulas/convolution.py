"""Convolutions of any number of dimensions, transposed or not, forward and backward.

The count is the usual dense one: every tap of the kernel is multiplied at every position, taps that fall on padding
included. With the weight ``(C_out, C_in / groups, *kernel)`` that is ``numel(weight)`` multiply-adds for each sample
and each output position; for a transposed convolution, whose weight is ``(C_in, C_out / groups, *kernel)``, for each
*input* position. The input's and the weight's gradient are the same products summed along another axis, so each costs
as much as the forward, for any ``groups``. The bias and its gradient (a sum) are free by declaration. Which algorithm
a kernel picks (Winograd, FFT) is not looked at.

``FlopCounterMode`` counts the weight gradient of a grouped convolution ``groups`` times too high.

Source: ``aten/src/ATen/native/Convolution.cpp``.
"""

from math import prod
from typing import Any

from .registry import Arguments, Count, Outputs, counts, numel


def convolution_flops(weight: Any, positions_of: Any) -> int:
    """FLOPs of one convolution; ``positions_of`` is the output, or the input of a transposed convolution."""
    num_spatial = len(weight.shape) - 2
    samples = positions_of.shape[: -num_spatial - 1]  # one batch axis, or none
    positions: int = prod(samples) * prod(positions_of.shape[-num_spatial:])
    return 2 * numel(weight) * positions


@counts("aten::convolution", "aten::_convolution", "aten::convolution_overrideable")
def dispatched_flops(a: Arguments, outputs: Outputs) -> Count:
    """The dispatcher's own entry: transposed or not."""
    return convolution_flops(a["weight"], a["input"] if a["transposed"] else outputs[0])


@counts(
    "aten::conv1d",
    "aten::conv2d",
    "aten::conv3d",
    "aten::thnn_conv2d",
    "aten::slow_conv3d",
    "aten::_slow_conv2d_forward",
    "aten::slow_conv3d_forward",
    "aten::slow_conv_dilated2d",
    "aten::slow_conv_dilated3d",
    "aten::_conv_depthwise2d",
    "aten::conv_depthwise3d",
    "aten::mkldnn_convolution",
    "aten::_nnpack_spatial_convolution",
    "aten::cudnn_convolution",
    "aten::cudnn_convolution_relu",
    "aten::cudnn_convolution_add_relu",
    "aten::miopen_convolution",
    "aten::miopen_convolution_relu",
    "aten::miopen_convolution_add_relu",
    "aten::miopen_depthwise_convolution",
    "aten::_mps_convolution",
)
def forward_flops(a: Arguments, outputs: Outputs) -> Count:
    """A kernel that is never transposed."""
    return convolution_flops(a["weight"], outputs[0])


@counts(
    "aten::conv_transpose1d",
    "aten::conv_transpose2d",
    "aten::conv_transpose3d",
    "aten::slow_conv_transpose2d",
    "aten::slow_conv_transpose3d",
    "aten::cudnn_convolution_transpose",
    "aten::miopen_convolution_transpose",
    "aten::_mps_convolution_transpose",
)
def transposed_flops(a: Arguments, outputs: Outputs) -> Count:
    """A kernel that is always transposed."""
    return convolution_flops(a["weight"], a["input"] if "input" in a else a["self"])


@counts("aten::conv_tbc")
def tbc_flops(a: Arguments, outputs: Outputs) -> Count:
    """Along the first axis of (time, batch, channel), weight ``(kernel, C_in, C_out)``: a product for each tap.

    This kernel leaves out the taps on padding (``aten/src/ATen/native/ConvolutionTBC.cpp``), so they do not count.
    """
    num_taps, num_in, num_out = a["weight"].shape
    length, batch = a["self"].shape[:2]
    pairs = sum(_overlap(tap - a["pad"], length, outputs[0].shape[0]) for tap in range(num_taps))
    return 2 * pairs * int(batch) * int(num_in) * int(num_out)


def _overlap(offset: int, num_inputs: int, num_outputs: int) -> int:
    """How many output positions ``t`` have ``t + offset`` among the inputs."""
    return max(0, min(num_outputs, num_inputs - offset) - max(0, -offset))


@counts("aten::convolution_backward", "aten::convolution_backward_overrideable")
def backward_flops(a: Arguments, outputs: Outputs) -> Count:
    """``(grad_input, grad_weight, grad_bias)``: what ``output_mask`` leaves out is not computed."""
    each = convolution_flops(a["weight"], a["input"] if a["transposed"] else a["grad_output"])
    return each * a["output_mask"][0], each * a["output_mask"][1], 0


@counts("aten::_slow_conv2d_backward", "aten::mps_convolution_backward")
def slow_backward_flops(a: Arguments, outputs: Outputs) -> Count:
    """As ``convolution_backward``; the ``grad_input`` overload has no mask: it computes what it is given to fill."""
    each = convolution_flops(a["weight"], a["grad_output"])
    wanted = a["output_mask"] if "output_mask" in a else [output is not None for output in outputs]
    return each * bool(wanted[0]), each * bool(wanted[1]), 0


@counts("aten::mps_convolution_transpose_backward")
def mps_transposed_backward_flops(a: Arguments, outputs: Outputs) -> Count:
    """``(grad_input, grad_weight)`` of a transposed convolution."""
    each = convolution_flops(a["weight"], a["self"])
    return each * a["output_mask"][0], each * a["output_mask"][1]
