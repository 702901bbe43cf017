"""Fused attention kernels, forward and backward, and the fused inference modules built on them.

Per batch entry and query head: ``S = Q K^T`` and ``O = P V`` forward; backward, all kernels that keep no scores
(flash, memory-efficient, cuDNN) run five products: ``S`` again, ``dV = P^T dO``, ``dP = dO V^T``, ``dQ = dS K`` and
``dK = dS^T Q``. They run all five whichever gradients are wanted, masked-off ones included, so which output a product
is booked on is a choice. Ours: ``grad_value`` has ``S`` and ``dV`` (what it would need alone), ``grad_query`` has
``dP`` and ``dQ``, ``grad_key`` has ``dK``; a bias gradient is ``dS`` itself, free.

Convention: a mask is no discount. A causal or windowed call counts as a dense one, although some kernels skip whole
blocks of masked scores (how many depends on block sizes that differ by kernel, dtype and chip), so that a figure means
the same on every device. With grouped-query attention each query head still meets its own keys, whether or not the
kernel shares their memory. Softmax, dropout and scaling are free by declaration. Sequences packed by cumulative
lengths, which are data, are not counted (None); nor is ``flex_attention``, whose kernel skips by the data of a mask.

Source: ``sdpa_flop_count`` and ``sdpa_backward_flop_count`` in ``torch/utils/flop_counter.py``, which leave out the
CPU kernel; ``aten/src/ATen/native/cpu/FlashAttentionKernel.cpp``; Dao, *FlashAttention-2*, arXiv 2307.08691, alg. 2.
"""

from typing import Any, NamedTuple

from .registry import Arguments, Count, Outputs, counts, numel


class _Products(NamedTuple):
    """FLOPs of one product over the head dimension of queries (``S``, ``dQ``, ``dK``) and of values (the others)."""

    over_query_dim: int
    over_value_dim: int


def _products(query: Any, key: Any, value: Any, *, sequence_axis: int) -> _Products:
    head_axis = -5 - sequence_axis  # the other one of -2 and -3
    batch = query.shape[0] if len(query.shape) == 4 else 1
    scores = int(batch * query.shape[head_axis] * query.shape[sequence_axis] * key.shape[sequence_axis])
    return _Products(2 * scores * int(query.shape[-1]), 2 * scores * int(value.shape[-1]))


def _forward(products: _Products) -> int:
    return products.over_query_dim + products.over_value_dim


def _backward(products: _Products) -> tuple[int, int, int]:
    """``(grad_query, grad_key, grad_value)``, booked as the module's docstring says."""
    dq_and_dp = products.over_query_dim + products.over_value_dim
    dk = products.over_query_dim
    dv_and_s = products.over_value_dim + products.over_query_dim
    return dq_and_dp, dk, dv_and_s


def _has_packed_lengths(a: Arguments) -> bool:
    """Whether how much is multiplied is written in a tensor, which we do not read."""
    names = ("cum_seq_q", "cum_seq_k", "cu_seqlens_q", "cu_seqlens_k", "seqlen_k", "seqused_k", "block_table")
    return any(a.get(name) is not None and numel(a[name]) > 0 for name in names)


@counts(
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_scaled_dot_product_attention_math_for_mps",
    "aten::scaled_dot_product_attention",
)
def sdpa_flops(a: Arguments, outputs: Outputs) -> Count:
    """``(batch, head, sequence, head_dim)``, never packed."""
    return _forward(_products(a["query"], a["key"], a["value"], sequence_axis=-2))


@counts("aten::_cudnn_attention_forward")
def cudnn_flops(a: Arguments, outputs: Outputs) -> Count:
    """As ``sdpa_flops``, or packed."""
    return None if _has_packed_lengths(a) else sdpa_flops(a, outputs)


@counts(
    "aten::_flash_attention_forward",
    "aten::_flash_attention_forward_no_dropout_inplace",
    "aten::_efficient_attention_forward",
)
def sequence_first_flops(a: Arguments, outputs: Outputs) -> Count:
    """``(batch, sequence, head, head_dim)``, or packed."""
    if _has_packed_lengths(a):
        return None
    return _forward(_products(a["query"], a["key"], a["value"], sequence_axis=-3))


@counts(
    "aten::_scaled_dot_product_flash_attention_backward",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    "aten::_scaled_dot_product_efficient_attention_backward",
    "aten::_scaled_dot_product_cudnn_attention_backward",
    "aten::_scaled_dot_product_fused_attention_overrideable_backward",
)
def sdpa_backward_flops(a: Arguments, outputs: Outputs) -> Count:
    """``(grad_query, grad_key, grad_value[, grad_bias])`` of ``(batch, head, sequence, head_dim)``, never packed."""
    return _backward(_products(a["query"], a["key"], a["value"], sequence_axis=-2))


@counts("aten::_cudnn_attention_backward")
def cudnn_backward_flops(a: Arguments, outputs: Outputs) -> Count:
    """As ``sdpa_backward_flops``, or packed."""
    return None if _has_packed_lengths(a) else sdpa_backward_flops(a, outputs)


@counts("aten::_flash_attention_backward", "aten::_efficient_attention_backward")
def sequence_first_backward_flops(a: Arguments, outputs: Outputs) -> Count:
    """``(grad_query, grad_key, grad_value[, grad_bias])`` of ``(batch, sequence, head, head_dim)``, or packed."""
    if _has_packed_lengths(a):
        return None
    return _backward(_products(a["query"], a["key"], a["value"], sequence_axis=-3))


@counts("aten::_native_multi_head_attention")
def multi_head_flops(a: Arguments, outputs: Outputs) -> Count:
    """``nn.MultiheadAttention`` in inference: four projections of ``embed_dim`` and the two products.

    Source: ``aten/src/ATen/native/transformers/attention.cpp``. Inference only: it has no backward.
    """
    return _attention_module_flops(a["query"], a["key"], a["embed_dim"])


@counts("aten::_transformer_encoder_layer_fwd")
def encoder_layer_flops(a: Arguments, outputs: Outputs) -> Count:
    """``nn.TransformerEncoderLayer`` in inference: its attention and its two linear layers.

    Source: ``aten/src/ATen/native/transformers/transformer.cpp``. Inference only: it has no backward.
    """
    tokens = numel(a["src"]) // int(a["embed_dim"])
    feed_forward = 2 * tokens * (numel(a["ffn_weight_1"]) + numel(a["ffn_weight_2"]))
    return _attention_module_flops(a["src"], a["src"], a["embed_dim"]) + feed_forward


def _attention_module_flops(query: Any, key: Any, embed_dim: int) -> int:
    """Projections of queries, keys, values and output, and both products of all heads together."""
    batch, num_queries, num_keys = (int(size) for size in (*query.shape[:2], key.shape[1]))
    projections = 2 * batch * embed_dim * embed_dim * (2 * num_queries + 2 * num_keys)
    return projections + 2 * 2 * batch * num_queries * num_keys * embed_dim
