"""Matrix products: ``mm`` and its relatives.

A product of ``(.., m, k)`` and ``(.., k, n)`` is ``m * n * k`` multiply-adds for each matrix of the batch. Scaling by
``alpha`` and ``beta``, the bias and the activation fused behind it are free by declaration, and so is ``addr``, which
adds up nothing. Sparse products have no formula: what they multiply depends on the data.

Source: ``torch/utils/flop_counter.py`` for the common ones; the rest from ``LinearAlgebra.cpp``, ``Linear.cpp``,
``Distance.cpp``, ``GroupedMMUtils.h`` and ``mkldnn/Linear.cpp`` in ``aten/src/ATen/native``.
"""

from collections.abc import Sequence
from math import prod

from .registry import Arguments, Count, Outputs, counts, numel


@counts("aten::mm", "aten::_int_mm", "aten::bmm", "aten::matmul", "aten::mv")
def mm_flops(a: Arguments, outputs: Outputs) -> Count:
    """``self @ x``: every element of the output is a dot product over the last axis of ``self``."""
    return 2 * numel(outputs[0]) * int(a["self"].shape[-1])


@counts("aten::dot", "aten::vdot")
def dot_flops(a: Arguments, outputs: Outputs) -> Count:
    """One multiply-add for each element."""
    return 2 * numel(a["self"])


@counts("aten::addmm", "aten::addmm_", "aten::_addmm_activation")
def addmm_flops(a: Arguments, outputs: Outputs) -> Count:
    """``beta * self + alpha * mat1 @ mat2``."""
    return 2 * numel(a["mat1"]) * int(a["mat2"].shape[-1])


@counts("aten::addmv", "aten::addmv_")
def addmv_flops(a: Arguments, outputs: Outputs) -> Count:
    """``beta * self + alpha * mat @ vec``."""
    return 2 * numel(a["mat"])


@counts("aten::baddbmm", "aten::baddbmm_", "aten::addbmm", "aten::addbmm_")
def baddbmm_flops(a: Arguments, outputs: Outputs) -> Count:
    """``beta * self + alpha * batch1 @ batch2``; ``addbmm`` also sums over the batch, which is the same products."""
    return 2 * numel(a["batch1"]) * int(a["batch2"].shape[-1])


@counts("aten::_foreach_mm")
def foreach_mm_flops(a: Arguments, outputs: Outputs) -> Count:
    """One ``mm`` for each pair of the two lists."""
    return tuple(2 * numel(one) * int(other.shape[-1]) for one, other in zip(a["self"], a["mat2"], strict=True))


@counts("aten::_grouped_mm")
def grouped_mm_flops(a: Arguments, outputs: Outputs) -> Count:
    """``self @ mat2`` in groups: both are batched, or one of ``m``, ``n`` and ``k`` is split among the groups.

    A row (or column) of a split axis meets one group only, so all groups together cost one product of whole axes.

    Assumes: the last entry of ``offs``, which is data, is the whole length of the split axis.
    """
    mat1, mat2 = a["self"].shape, a["mat2"].shape
    batch = int(mat1[0]) if len(mat1) == len(mat2) == 3 else 1
    return 2 * batch * int(mat1[-2]) * int(mat1[-1]) * int(mat2[-1])


@counts("aten::_scaled_mm", "aten::_scaled_mm_v2", "aten::_scaled_grouped_mm", "aten::_scaled_grouped_mm_v2")
def scaled_mm_flops(a: Arguments, outputs: Outputs) -> Count:
    """As ``mm`` and ``_grouped_mm``, on 8-bit floats; the scales are free.

    Not counted: packed 4-bit floats, and products over other axes than the usual ones (``contraction_dim``).
    """
    unusual = "float4" in str(a["self"].dtype) or a.get("contraction_dim")
    return None if unusual else grouped_mm_flops(a, outputs)


@counts(
    "aten::linear",
    "aten::mkldnn_linear",
    "aten::_mixed_dtypes_linear",
    "mkldnn::_linear_pointwise",
    "mkl::_mkl_linear",
)
def linear_flops(a: Arguments, outputs: Outputs) -> Count:
    """``input @ weight.T``, where it is one op: under inference mode, and on some devices."""
    inputs = next(a[name] for name in ("input", "self", "X") if name in a)
    return 2 * numel(outputs[0]) * int(inputs.shape[-1])


@counts(
    "aten::_weight_int8pack_mm",
    "aten::_weight_int4pack_mm",
    "aten::_weight_int4pack_mm_for_cpu",
    "aten::_weight_int4pack_mm_with_scales_and_zeros",
    "aten::_dyn_quant_matmul_4bit",
)
def packed_weight_mm_flops(a: Arguments, outputs: Outputs) -> Count:
    """Activations times a packed integer weight, whose own shape says nothing; unpacking it is free."""
    inputs = a["inp"] if "inp" in a else a["self"]
    return 2 * numel(outputs[0]) * int(inputs.shape[-1])


@counts("aten::linear_backward", "aten::mkldnn_linear_backward")
def linear_backward_flops(a: Arguments, outputs: Outputs) -> Count:
    """``(grad_input, grad_weight, grad_bias)``: what ``output_mask`` leaves out is not computed."""
    each = 2 * numel(a["grad_output"]) * int(a["weight"].shape[-1])
    return each * a["output_mask"][0], each * a["output_mask"][1], 0


@counts("aten::mkldnn_linear_backward_input", "aten::mkldnn_linear_backward_weights")
def mkldnn_linear_backward_half_flops(a: Arguments, outputs: Outputs) -> Count:
    """One half of ``linear_backward``."""
    return 2 * numel(a["grad_output"]) * int(a["weight"].shape[-1])


@counts("aten::affine_grid_generator")
def affine_grid_flops(a: Arguments, outputs: Outputs) -> Count:
    """The homogeneous coordinates of every position times ``theta`` (a ``bmm`` inside the op)."""
    return 2 * numel(outputs[0]) * int(a["theta"].shape[-1])


@counts("aten::matmul_backward")
def matmul_backward_flops(a: Arguments, outputs: Outputs) -> Count:
    """``(grad_self, grad_other)``: what ``mask`` leaves out is not computed."""
    num_columns = 1 if len(a["other"].shape) == 1 else int(a["other"].shape[-1])
    num_products = numel(a["grad"]) // num_columns if num_columns else 0
    each = 2 * num_products * int(a["self"].shape[-1]) * num_columns
    return each * a["mask"][0], each * a["mask"][1]


@counts("aten::_cdist_forward")
def cdist_flops(a: Arguments, outputs: Outputs) -> Count:
    """Distances by the element, free by declaration, unless this op is asked for a product (``cdist`` never does)."""
    mode = a["compute_mode"] or 0
    many_rows = a["x1"].shape[-2] > 25 or a["x2"].shape[-2] > 25
    by_product = a["p"] == 2 and (mode == 1 or (mode == 0 and many_rows))
    return euclidean_dist_flops(a, outputs) if by_product else 0


@counts("aten::_euclidean_dist")
def euclidean_dist_flops(a: Arguments, outputs: Outputs) -> Count:
    """``|x|^2 - 2 x.y + |y|^2`` as one product over ``features + 2`` columns: how ``cdist`` goes above 25 rows."""
    return 2 * numel(outputs[0]) * (int(a["x1"].shape[-1]) + 2)


@counts("aten::_trilinear")
def trilinear_flops(a: Arguments, outputs: Outputs) -> Count:
    """``(i1 * i2 * i3).sum(sumdim)``, the op behind ``nn.Bilinear`` and its gradients.

    The kernel walks along ``unroll_dim``; for each slice it contracts ``i1`` with ``i2`` over the axes that ``i3``
    lacks, then the result with ``i3`` over the rest. Where nothing is left to contract it multiplies element-wise, and
    slices are added up element-wise, which is free: a gradient of ``nn.Bilinear`` counts one ``bmm``, its forward two.
    """
    expanded = [_expand(a[f"i{i}"].shape, a[f"expand{i}"]) for i in (1, 2, 3)]
    unrolled = a["unroll_dim"]
    num_slices = max(sizes[unrolled] for sizes in expanded)
    i1, i2, i3 = ([1 if dim == unrolled else size for dim, size in enumerate(sizes)] for sizes in expanded)
    summed = [dim for dim in a["sumdim"] if dim != unrolled]
    first, product = _contract(i1, i2, [dim for dim in summed if dim in a["expand3"]])
    second, _ = _contract(product, i3, [dim for dim in summed if dim not in a["expand3"]])
    return num_slices * (first + second)


def _expand(shape: Sequence[int], new_axes: Sequence[int]) -> list[int]:
    sizes = list(shape)
    for axis in sorted(new_axes):
        sizes.insert(axis, 1)
    return sizes


def _contract(left: list[int], right: list[int], summed: list[int]) -> tuple[int, list[int]]:
    """FLOPs and shape (summed axes kept as 1) of ``at::native::sumproduct_pair``; sums one factor lacks come first."""
    one_sided = {dim for dim in summed if 1 in (left[dim], right[dim])}
    sizes = [1 if dim in one_sided else max(pair) for dim, pair in enumerate(zip(left, right, strict=True))]
    flops = 2 * prod(sizes) if summed else 0
    return flops, [1 if dim in summed else size for dim, size in enumerate(sizes)]
