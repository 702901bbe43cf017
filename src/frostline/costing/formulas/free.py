"""Ops that are free of FLOPs by declaration: they contract nothing.

First by what torch says of an op (a tag, an output that is a view, no tensor to read), then by the list below. An op
written in place, into ``out=``, for a list (``_foreach_add_``) or for a gradient (``gelu_backward``) is as free as the
op it is a form of. Nothing is free for being unknown.

Free does not mean fast: these ops move bytes. Among them are additions and multiplications by the element, sums (a
bias gradient, a mean, the statistics of a norm) and interpolations, a few of each for every element.
"""

import re
from functools import cache

import torch
from torch._ops import OpOverload, OpOverloadPacket

_LISTED = {
    "copying, filling, reshaping": """
        affine_grid_generator_backward as_strided as_strided_scatter atleast_1d atleast_2d atleast_3d block_diag
        broadcast_tensors cartesian_prod cat channel_shuffle _chunk_cat clone column_stack combinations complex concat
        concatenate constant_pad_nd copy _copy_from _copy_from_and_resize diag diag_embed diagflat diagonal
        diagonal_scatter dstack _efficientzerotensor empty_like fill fill_diagonal flatten_dense_tensors flip fliplr
        flipud full_like hstack _lazy_clone lift masked_fill meshgrid _mkldnn_reshape _mkldnn_transpose
        native_channel_shuffle new_empty new_empty_strided new_full new_ones new_zeros
        _new_zeros_with_same_feature_meta one_hot ones_like pad _pad_circular _pad_enum pad_sequence _pin_memory
        pixel_shuffle pixel_unshuffle polar repeat repeat_interleave _reshape_copy resize resize_as resize_as_sparse
        _resize_output roll rot90 row_stack select select_scatter set slice slice_scatter split_copy
        split_with_sizes_copy _stack stack sum_to_size tile _to_copy _to_cpu to_mkldnn tril triu type_as unbind_copy
        unflatten_dense_tensors unfold unsafe_chunk unsafe_split unsafe_split_with_sizes _unsafe_view vstack where
        zero zeros_like
        """,
    "padding": """
        reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
        """,
    "asking": """
        allclose _assert_async _assert_scalar _assert_tensor_metadata cudnn_is_acceptable _debug_has_internal_overlap
        dense_dim device dim element_size equal _functional_assert_async _functional_assert_scalar
        _functional_sym_constrain_range _functional_sym_constrain_range_for_size _fused_sdp_choice get_device
        _has_compatible_shallow_copy_type _has_same_storage_numel _is_all_true _is_any_true is_coalesced is_complex
        is_conj is_contiguous is_floating_point is_inference is_leaf is_neg is_non_overlapping_and_dense is_nonzero
        is_pinned is_same_size is_set_to is_signed is_strides_like_format _is_zerotensor item layout
        _linalg_check_errors _local_scalar_dense _nested_tensor_from_mask_left_aligned _nnz numel q_per_channel_axis
        q_per_channel_scales q_per_channel_zero_points q_scale q_zero_point qscheme record_stream result_type size
        sparse_dim storage_offset stride sym_is_contiguous sym_numel sym_size sym_storage_offset sym_stride
        _use_cudnn_ctc_loss _use_miopen_ctc_loss _validate_compressed_sparse_indices _version
        """,
    "indexing, gathering, scattering": """
        argwhere gather index index_add index_copy index_fill index_put _index_put_impl index_reduce index_select
        masked_scatter masked_select nonzero nonzero_static put scatter scatter_add scatter_reduce take take_along_dim
        _unsafe_index _unsafe_index_put _unsafe_masked_index _unsafe_masked_index_put_accumulate
        value_selecting_reduction
        """,
    "embeddings": """
        embedding _embedding_bag embedding_bag _embedding_bag_dense _embedding_bag_forward_only
        _embedding_bag_per_sample_weights _embedding_bag_sparse embedding_dense embedding_renorm embedding_sparse
        """,
    "by the element, where torch has no tag for it": """
        _add_relu addr _amp_foreach_non_finite_check_and_unscale _amp_update_scale celu _conj_physical copysign
        cosine_similarity cross elu floor_divide ger glu glu_backward_jvp glu_jvp hardswish __iand__ __ilshift__
        __ior__ __irshift__ isclose isin isreal __ixor__ kron linalg_cross log_sigmoid __lshift__ outer prelu
        _prelu_kernel relu6 rrelu rrelu_with_noise rrelu_with_noise_functional __rshift__ softplus
        _thnn_fused_gru_cell _thnn_fused_lstm_cell _thnn_fused_lstm_cell_backward_impl _transform_bias_rescale_qkv
        vander
        """,
    "other names of ops by the element, seen under inference mode": """
        absolute arccos arccosh arcsin arcsinh arctan arctan2 arctanh chalf divide fix greater greater_equal less
        less_equal multiply negative not_equal special_digamma special_erf special_erfc special_erfinv special_exp2
        special_expit special_expm1 special_gammainc special_gammaincc special_gammaln special_i0 special_log1p
        special_log_softmax special_logit special_logsumexp special_multigammaln special_ndtr special_polygamma
        special_psi special_round special_sinc special_softmax special_xlogy subtract
        """,
    "optimizers": """
        _fused_adagrad _fused_adam _fused_adamw _fused_sgd
        """,
    "reductions, norms of tensors, statistics": """
        _aminmax aminmax bincount count_nonzero dist _foreach_powsum hash_tensor histc histogram
        _histogramdd_bin_edges _histogramdd_from_bin_cts _histogramdd_from_bin_tensors kthvalue linalg_vector_norm
        median mode nanmedian norm_except_dim renorm _segment_reduce segment_reduce std_mean trace var_mean
        """,
    "scans": """
        cummax _cummax_helper cummaxmin cummin _cummin_helper cumprod cumsum cumulative_trapezoid diff _logcumsumexp
        logcumsumexp trapezoid trapz
        """,
    "sorting, searching": """
        argsort bucketize msort searchsorted sort topk _unique _unique2 unique_consecutive unique_dim
        unique_dim_consecutive
        """,
    "normalisation": """
        batch_norm batch_norm_backward_elemt batch_norm_backward_reduce batch_norm_elemt batch_norm_gather_stats
        batch_norm_gather_stats_with_counts _batch_norm_impl_index _batch_norm_no_update batch_norm_stats
        batch_norm_update_stats _batch_norm_with_update _batch_norm_with_update_functional cudnn_batch_norm
        _fused_rms_norm group_norm instance_norm layer_norm miopen_batch_norm native_batch_norm
        _native_batch_norm_legit _native_batch_norm_legit_functional _native_batch_norm_legit_no_training
        native_group_norm native_layer_norm native_norm rms_norm _weight_norm _weight_norm_interface
        """,
    "softmax": """
        _log_softmax log_softmax _log_softmax_backward_data _masked_softmax _nested_tensor_softmax_with_shape
        _safe_softmax _softmax softmax _softmax_backward_data
        """,
    "pooling": """
        adaptive_avg_pool1d _adaptive_avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool3d
        adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d
        fractional_max_pool2d fractional_max_pool3d max_pool1d max_pool1d_with_indices max_pool2d
        max_pool2d_with_indices max_pool3d max_pool3d_with_indices max_unpool2d max_unpool3d
        mkldnn_adaptive_avg_pool2d mkldnn_max_pool2d mkldnn_max_pool3d
        """,
    "interpolation, windows of pixels": """
        col2im cudnn_grid_sampler grid_sampler grid_sampler_2d _grid_sampler_2d_cpu_fallback grid_sampler_3d im2col
        upsample_bicubic2d _upsample_bicubic2d_aa upsample_bilinear2d _upsample_bilinear2d_aa _upsample_lanczos2d_aa
        upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
        _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_trilinear3d
        """,
    "losses, pairwise distances": """
        binary_cross_entropy binary_cross_entropy_with_logits _cdist_backward cosine_embedding_loss cross_entropy_loss
        _ctc_loss ctc_loss _cudnn_ctc_loss hinge_embedding_loss huber_loss kl_div l1_loss margin_ranking_loss
        miopen_ctc_loss mse_loss multi_margin_loss multilabel_margin_loss nll_loss nll_loss2d nll_loss_nd
        pairwise_distance _pdist pdist poisson_nll_loss smooth_l1_loss soft_margin_loss triplet_margin_loss
        """,
    "random numbers, dropout": """
        alpha_dropout bernoulli binomial cauchy _cudnn_init_dropout_state _dirichlet_grad dropout exponential
        feature_alpha_dropout feature_dropout _fill_mem_eff_dropout_mask _fused_dropout geometric log_normal
        _masked_scale multinomial native_dropout normal normal_functional _philox_key_fold_in _philox_key_split
        _philox_normal _philox_uniform poisson rand_like randint_like randn_like random _sample_dirichlet
        _standard_gamma _standard_gamma_grad uniform
        """,
    "packed, ragged and sparse storage": """
        _coalesce _coalesced _convert_indices_from_coo_to_csr _convert_indices_from_csr_to_coo copy_sparse_to_sparse
        _cudnn_rnn_flatten_weight _dimI _dimV _jagged_to_padded_dense lu_unpack mkldnn_reorder_conv2d_weight
        mkldnn_reorder_conv3d_weight _nested_compute_contiguous_strides_offsets _nested_from_padded
        _nested_from_padded_and_nested_example _nested_from_padded_tensor _nested_get_jagged_dummy _nested_get_lengths
        _nested_get_max_seqlen _nested_get_min_seqlen _nested_get_offsets _nested_get_ragged_idx _nested_select
        _nested_sum _nested_tensor_from_mask _nested_tensor_from_tensor_list _nested_tensor_size
        _nested_tensor_storage_offsets _nested_tensor_strides nested_to_padded_tensor _pack_padded_sequence
        _pad_packed_sequence _padded_dense_to_jagged sparse_compressed_tensor sparse_coo_tensor
        _sparse_coo_tensor_with_dims_and_tensors _sparse_csr_prod _sparse_csr_sum _sparse_log_softmax
        _sparse_log_softmax_backward_data sparse_mask _sparse_mask_projection sparse_resize sparse_resize_and_clear
        _sparse_softmax _sparse_softmax_backward_data _sparse_sum _spdiags _to_dense to_dense to_padded_tensor
        _to_sparse to_sparse _to_sparse_bsc to_sparse_bsc _to_sparse_bsr to_sparse_bsr _to_sparse_csc to_sparse_csc
        _to_sparse_csr to_sparse_csr
        """,
    "quantising": """
        _convert_weight_to_int4pack _convert_weight_to_int4pack_for_cpu dequantize _dyn_quant_pack_4bit_weight
        _empty_affine_quantized _empty_per_channel_affine_quantized empty_quantized
        _fake_quantize_learnable_per_channel_affine _fake_quantize_learnable_per_tensor_affine
        fake_quantize_per_channel_affine fake_quantize_per_channel_affine_cachemask fake_quantize_per_tensor_affine
        fake_quantize_per_tensor_affine_cachemask _fake_quantize_per_tensor_affine_cachemask_tensor_qparams
        _fused_moving_avg_obs_fq_helper _fused_moving_avg_obs_fq_helper_functional int_repr
        _make_per_channel_quantized_tensor _make_per_tensor_quantized_tensor quantize_per_channel quantize_per_tensor
        quantize_per_tensor_dynamic quantized_batch_norm quantized_max_pool1d quantized_max_pool2d
        quantized_max_pool3d
        """,
}
FREE = frozenset(name for names in _LISTED.values() for name in names.split())

_TORCH = ("aten", "prim", "prims")
_COMMUNICATION = ("_c10d_functional", "_c10d_functional_autograd", "c10d", "c10d_functional")
_FREE_TAGS = {torch.Tag.pointwise, torch.Tag.view_copy}
_FREE_TAGS |= {torch.Tag.reduction} if hasattr(torch.Tag, "reduction") else set()


@cache
def is_free(op: OpOverload) -> bool:
    """Whether the op is declared free of FLOPs. Another library's op is free only if it is tagged pointwise.

    Frostline's own ops pack and unpack bits.
    """
    if torch.Tag.pointwise in op.tags or op.namespace in _COMMUNICATION or op.namespace == "frostline":
        return True
    return op.namespace in _TORCH and (_says_torch(op) or any(_is_free_form(op, name) for name in _forms(op)))


def _forms(op: OpOverload) -> list[str]:
    """The op's name, then those of the ops that it is a form of: ``_foreach_add_``, ``_foreach_add``, ``add``."""
    name = op._schema.name.partition("::")[2]
    forms = [name]
    for form in (r"(?<=[^_])_$", r"_(backward|forward)$", r"^_foreach_"):
        shorter = re.sub(form, "", forms[-1])
        if shorter != forms[-1]:
            forms.append(shorter)
    return forms


def _is_free_form(op: OpOverload, name: str) -> bool:
    if name in FREE:
        return True
    packet = getattr(getattr(torch.ops, op.namespace), name, None)
    if not isinstance(packet, OpOverloadPacket):
        return False
    overloads: list[str] = packet.overloads()
    return any(_says_torch(getattr(packet, overload)) for overload in overloads)


def _says_torch(op: OpOverload) -> bool:
    """Whether a tag, a returned view or the lack of tensors to read shows that the op contracts nothing."""
    return bool(_FREE_TAGS & set(op.tags)) or _is_view(op) or _is_factory(op)


def _is_view(op: OpOverload) -> bool:
    """Whether an output aliases an input that the op does not write."""
    return any(value.alias_info is not None and not value.alias_info.is_write for value in op._schema.returns)


def _is_factory(op: OpOverload) -> bool:
    """Whether the op reads no tensor: what it is to write into (``out=``) aside."""
    read = [argument for argument in op._schema.arguments if not argument.is_out]
    return not any("Tensor" in str(argument.type) for argument in read)
