"""The reference itself, held to figures a reader can check on paper and to three other observers of torch."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.cases import CASES, Case, CaseBuilder, build, subsets_for, trainable_names
from tests.truth.reference import METHODS, Refused, Truth, Unreachable, measure
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

ALL = list(CASES.values())


def total(outputs: Tensor) -> Tensor:
    return outputs.sum()


def simple(model: Callable[[], nn.Module], *shape: int, loss: Callable[[Any], Tensor] = total) -> Case:
    return build(lambda: Case(model(), torch.randn(*shape), loss))


def backward(truth: Truth) -> tuple[int, int, int]:
    return truth.grad_input_flops, truth.grad_weight_flops, truth.recompute_flops


def skip_if_missing(builder: CaseBuilder) -> None:
    if builder.missing:
        pytest.skip(builder.missing)


# On paper ------------------------------------------------------------------------------------------------------------

LINEAR = 2 * 8 * 16 * 4  # FLOPs of f32[8, 16] @ f32[16, 4]; dX and dW cost the same


def test_linear_keeps_its_input_only_while_its_weight_trains():
    case = simple(lambda: nn.Linear(16, 4), 8, 16)
    weight = measure(case, ["weight"])
    assert weight.saved_bytes == 8 * 16 * 4
    assert (weight.forward_flops, *backward(weight)) == (LINEAR, 0, LINEAR, 0)
    assert weight.gradient_bytes == 16 * 4 * 4
    assert weight.optimizer_bytes == 2 * 16 * 4 * 4 + 4  # two moments and a step count, f32 each
    assert weight.parameter_bytes == (16 * 4 + 4) * 4
    assert weight.trained_with_grad == {"weight"}
    bias = measure(case, ["bias"])
    assert bias.saved_bytes == 0  # the sum of the loss keeps nothing either
    assert (bias.forward_flops, *backward(bias)) == (LINEAR, 0, 0, 0)
    assert bias.gradient_bytes == 4 * 4


def test_methods_pay_for_different_things():
    case = simple(lambda: nn.Linear(16, 4), 8, 16)
    hands_over = measure(case, ["bias"], "optimizer-only")
    assert (hands_over.saved_bytes, *backward(hands_over)) == (8 * 16 * 4, 0, LINEAR, 0)
    assert hands_over.gradient_bytes == (16 * 4 + 4) * 4  # the weight's gradient too
    assert hands_over.optimizer_bytes == 2 * 4 * 4 + 4  # the bias's state only
    named = measure(case, ["bias"], "backward-inputs")
    assert (named.saved_bytes, *backward(named)) == (8 * 16 * 4, 0, 0, 0)  # saved all the same
    assert named.gradient_bytes == 4 * 4


def test_only_what_lies_between_the_subset_and_the_loss_is_paid():
    # f32[4, 6] -> 8 -> 5: forward 2*4*6*8 + 2*4*8*5 = 384 + 320
    case = simple(lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5)), 4, 6)
    first = measure(case, ["0.weight"])
    assert first.forward_flops == 384 + 320
    assert backward(first) == (320, 384, 0)  # dX of the second, dW of the first
    assert first.saved_bytes == 4 * 6 * 4  # the first's input; the second's dX reads a parameter
    last = measure(case, ["1.weight"])
    assert backward(last) == (0, 320, 0)
    assert last.saved_bytes == 4 * 8 * 4
    everything = measure(case, trainable_names(case.model))
    assert backward(everything) == (320, 384 + 320, 0)
    assert everything.saved_bytes == 4 * 6 * 4 + 4 * 8 * 4


def test_the_founding_question():
    # Ten equal layers of 12, batch 6; layer 4 trains: dX of layers 9 to 5, dW of 4.
    one = 2 * 6 * 12 * 12
    truth = measure(CASES["ten_equal_layers"](), ["4.weight", "4.bias"])
    assert (truth.forward_flops, *backward(truth)) == (10 * one, 5 * one, one, 0)


def test_a_convolution_is_split_by_output():
    # 2 x 3 x 8 x 8 -> 5 -> 4 channels, 3 x 3: 2*2*5*64*3*9 and 2*2*4*64*5*9 FLOPs each way
    first, second = 2 * 2 * 5 * 64 * 3 * 9, 2 * 2 * 4 * 64 * 5 * 9
    case = simple(lambda: nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 4, 3, padding=1)), 2, 3, 8, 8)
    truth = measure(case, trainable_names(case.model))
    assert (truth.forward_flops, *backward(truth)) == (first + second, second, first + second, 0)
    assert truth.saved_bytes == (2 * 3 * 64 + 2 * 5 * 64) * 4  # both inputs
    early = measure(case, ["0.bias"])
    assert backward(early) == (second, 0, 0)
    assert early.saved_bytes == 2 * 5 * 64 * 4 + 2 * 3 * 64 * 4  # both inputs, though no gradient reads either


def test_groups_divide_a_convolution():
    each_way = 2 * (1 * 4 * 36) * (2 * 9)  # f32[1, 4, 6, 6], two groups: two input channels an output
    truth = measure(simple(lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2), 1, 4, 6, 6), ["weight"])
    assert (truth.forward_flops, *backward(truth)) == (each_way, 0, each_way, 0)


def test_saved_views_count_once_and_outputs_count_if_kept():
    # exp keeps its own result: the loss's 4 bytes. The relu keeps its result, which the second linear keeps too.
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 5, bias=False))
    case = build(lambda: Case(nn.Sequential(*model), torch.randn(4, 6), lambda out: out.sum().exp()))
    assert measure(case, trainable_names(model)).saved_bytes == 4 * 6 * 4 + 4 * 8 * 4 + 4


class Checkpoint(nn.Module):
    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.entry, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 3)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        body = nn.Sequential(self.a, nn.Tanh(), self.b)
        return checkpoint(body, self.entry(x), use_reentrant=self.use_reentrant)


ENTRY, A, B = 2 * 4 * 6 * 8, 2 * 4 * 8 * 10, 2 * 4 * 10 * 3


def test_a_checkpoint_stops_recomputing_early():
    case = simple(lambda: Checkpoint(use_reentrant=False), 4, 6)
    truth = measure(case, trainable_names(case.model))
    assert truth.forward_flops == ENTRY + A + B
    assert backward(truth) == (A + B, ENTRY + A + B, A)  # what b returns is saved by nobody: b is not run again
    assert truth.saved_bytes == 4 * 6 * 4 + 4 * 8 * 4  # the entry's input, the checkpoint's input


def test_a_reentrant_checkpoint_recomputes_all_and_its_inner_backward_is_no_recompute():
    case = simple(lambda: Checkpoint(use_reentrant=True), 4, 6)
    truth = measure(case, trainable_names(case.model))
    assert backward(truth) == (A + B, ENTRY + A + B, A + B)
    assert truth.saved_bytes == 4 * 6 * 4 + 4 * 8 * 4
    with pytest.raises(Refused, match="use_reentrant=True"):
        measure(case, ["entry.weight"], "backward-inputs")
    # The outer graph does not know a: named alone, nothing runs and nobody says so.
    assert measure(case, ["a.weight"], "backward-inputs").trained_with_grad == frozenset()
    with pytest.raises(Unreachable):  # nothing that enters the checkpoint requires grad
        measure(case, ["a.weight"])


def test_a_reentrant_checkpoint_can_cut_the_gradient_in_silence():
    truth = measure(CASES["checkpoint_reentrant_cut"](), ["0.blocks.0.0.weight", "1.weight"])
    assert truth.trained_with_grad == {"1.weight"}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q * self.scale, k, v)


def test_fused_attention_runs_five_products_backward_for_one_gradient():
    # f32[2, 3, 5, 6] queries, 7 keys: one product is 2*2*3*5*7*6 FLOPs; the kernel masks no output.
    product = 2 * 2 * 3 * 5 * 7 * 6
    shapes = (2, 3, 5, 6), (2, 3, 7, 6), (2, 3, 7, 6)
    truth = measure(build(lambda: Case(Attention(), tuple(map(torch.randn, shapes)), total)), ["scale"])
    assert (truth.forward_flops, *backward(truth)) == (2 * product, 5 * product, 0, 0)
    q, kv, out, log_sum_exp = 2 * 3 * 5 * 6 * 4, 2 * 3 * 7 * 6 * 4, 2 * 3 * 5 * 6 * 4, 2 * 3 * 5 * 4
    # The product q * scale keeps q, the attention q * scale, k, v, its output and one f32 a row.
    assert truth.saved_bytes == q + q + 2 * kv + out + log_sum_exp


class WeightSide(nn.Module):
    """``x @ (a @ b)``: the gradient towards ``a @ b`` is one towards something made from parameters alone."""

    def __init__(self, *, noisy: bool = False, masked: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 5))
        self.register_buffer("mask", torch.ones(6, 2))
        self.noisy, self.masked = noisy, masked

    def forward(self, x: Tensor) -> Tensor:
        a = self.a * self.mask * torch.ones(2) * 0.5 if self.masked else self.a
        return x @ ((a * torch.rand(6, 2) if self.noisy else a) @ self.b)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (0, 2 * 4 * 6 * 5 + 2 * 6 * 2 * 5)),
        ({"masked": True}, (0, 2 * 4 * 6 * 5 + 2 * 6 * 2 * 5)),  # buffers, factories and numbers are neutral
        ({"noisy": True}, (2 * 4 * 6 * 5 + 2 * 6 * 2 * 5, 0)),  # random numbers are data
    ],
)
def test_weight_side_is_what_parameters_made_and_no_data_touched(options, expected):
    truth = measure(simple(lambda: WeightSide(**options), 4, 6), ["a"])
    assert backward(truth) == (*expected, 0)


def test_a_function_that_ignores_needs_input_grad_pays_for_frozen_weights():
    # Linear 6 -> 8, Rude 8 -> 7, Rude 7 -> 5, Linear 5 -> 2 on four rows; only the second's bias trains.
    case = CASES["function_ignores_needs_input_grad"]()
    polite, rude = measure(CASES["function_with_weights"](), ["2.bias"]), measure(case, ["2.bias"])
    after = 2 * 4 * 7 * 5 + 2 * 4 * 5 * 2  # dX of the last two
    assert backward(polite) == (after, 0, 0)
    # It also makes dX of its own, which no one takes, and dW of both; dX that lands in a frozen slot is grad_input.
    assert backward(rude) == (after + 2 * 4 * 8 * 7, 2 * 4 * 8 * 7 + 2 * 4 * 7 * 5, 0)


def test_shared_work_of_a_function_is_grad_input_unless_only_weights_want_it():
    # relu(x @ a) @ b on x f32[3, 6], a 6 x 7, b 7 x 4; then a head 4 -> 2.
    hidden, out, head = 2 * 3 * 6 * 7, 2 * 3 * 7 * 4, 2 * 3 * 4 * 2
    case = CASES["function_shared_work"]()
    # b alone: x @ a is rebuilt for b's gradient only. The backward makes grad_hidden too, which nobody takes.
    assert backward(measure(case, ["b"])) == (head + out, hidden + out, 0)
    # a alone: x @ a (for the mask) and grad @ b.T end in a's gradient.
    assert backward(measure(case, ["a"])) == (head, hidden + out + hidden, 0)
    # Something before it: both end in x's gradient as well.
    everything = measure(case, trainable_names(case.model))
    first = 2 * 3 * 5 * 6
    assert backward(everything) == (head + hidden + out + hidden, first + hidden + out + head, 0)


def test_a_function_that_runs_autograd_inside_is_judged_node_by_node():
    # Linear 5 -> 8, two reversible blocks with f: 4 -> 4 -> 4 and g: 4 -> 4, Linear 8 -> 2; three rows.
    case = CASES["function_reversible"]()
    half, entry, head = 2 * 3 * 4 * 4, 2 * 3 * 5 * 8, 2 * 3 * 8 * 2
    truth = measure(case, trainable_names(case.model))
    assert truth.forward_flops == entry + 6 * half + head
    # A block's backward reruns its three linears, which is not torch's checkpoint: what feeds the gradients towards
    # its inputs is grad_input; then three dX and three dW.
    assert backward(truth) == (head + 2 * (3 + 3) * half, entry + 2 * 3 * half + head, 0)


def test_attributes_of_a_function_count_as_saved_and_those_of_a_module_do_not():
    # HiddenSave keeps its input, squared, on ctx: 4 x 8 and 4 x 7. Hooks see neither; both stay alive.
    case = CASES["function_keeps_attribute"]()
    only_last = measure(case, ["4.weight"])
    assert only_last.saved_bytes == 2 * (4 * 7 * 4) + 4 * 2 * 4  # x and x squared; the loss's square keeps out
    # constant_attribute leaves f32[9, 6] on the module: not saved by autograd. Saved: x, 3 x 4, used twice; the input
    # of b, 3 x 6; the constant scale, 6; the output, 3 x 2, for the loss.
    kept = measure(CASES["constant_attribute"](), ["a.weight", "b.weight"])
    assert kept.saved_bytes == (3 * 4 + 3 * 6 + 6 + 3 * 2) * 4


def test_sparse_gradients_count_indices_and_values_and_adamw_refuses_them():
    truth = measure(CASES["sparse_embedding"](), ["embedding.weight"])
    assert truth.gradient_bytes == 14 * 8 + 14 * 8 * 4  # 2 x 7 tokens: an int64 index and 8 f32 each
    assert truth.optimizer_bytes is None
    assert measure(CASES["sparse_embedding"](), ["embedding.weight"], optimizer=torch.optim.SGD).optimizer_bytes == 0


def test_a_tied_parameter_has_two_names_and_one_gradient():
    truth = measure(CASES["tied_embedding"](), ["head.weight", "embedding.weight"])
    assert truth.gradient_bytes == 20 * 8 * 4
    assert truth.trained_with_grad == {"head.weight", "embedding.weight"}


def test_gradients_taken_inside_the_step_are_forward():
    # 4 -> 6 -> 6 -> 1 on three rows: the inner gradient is one dX of each layer, made before the loss returns.
    layers = 2 * 3 * (4 * 6 + 6 * 6 + 6 * 1)
    assert measure(CASES["gradient_penalty"](), ["0.weight"]).forward_flops == 2 * layers


def test_what_has_no_formula_is_named():
    assert measure(CASES["svd_values_only"](), ["scale"]).uncounted == {"aten._linalg_svd.default"}


# Other observers -----------------------------------------------------------------------------------------------------

HOOKED = ["mlp", "linear_10_20_10_5", "norms_1d", "mnist_cnn", "batch_norm_cnn_train", "resnet18", "unet", "conv_1d"]
HOOKED += ["lstm_classifier", "attention_learned_bias", "transformer_encoder_train", "float64_mlp", "tied_embedding"]


@pytest.mark.parametrize("name", HOOKED)
def test_saved_bytes_are_what_saved_tensor_hooks_see(name):
    case = CASES[name]()
    for label, train in subsets_for(case).items():
        truth = measure(case, train)
        copy = case.fresh()
        for parameter_name, parameter in copy.model.named_parameters():
            parameter.requires_grad_(parameter_name in train)
        own = {t.untyped_storage()._cdata for t in [*copy.model.parameters(), *copy.model.buffers()]}
        packed: dict[int, Tensor] = {}

        def pack(tensor: Tensor, packed: dict[int, Tensor] = packed) -> Tensor:
            packed[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            copy.run()
        seen = sum(t.untyped_storage().nbytes() for key, t in packed.items() if key not in own)
        assert truth.saved_bytes == seen, label


@pytest.mark.parametrize("builder", ALL, ids=lambda builder: builder.name)
def test_saved_bytes_are_what_the_allocator_did_not_get_back(builder):
    """Without any dispatch mode or hook. Two things are held that no op takes as a tensor, and are told apart here:
    the number of ``x * 2.0``, which autograd keeps as a tensor, and the RNG state a checkpoint keeps."""
    skip_if_missing(builder)
    case = builder()
    train = subsets_for(case)["all"]
    saved_bytes = measure(case, train).saved_bytes
    case.fresh().run()  # what torch allocates once, on first use
    rng_states: list[StorageWeakRef] = []
    get_rng_state = torch.get_rng_state

    def noted_rng_state() -> Tensor:
        state = get_rng_state()
        rng_states.append(StorageWeakRef(state.untyped_storage()))
        return state

    gc.collect()
    with (
        pytest.MonkeyPatch.context() as patch,
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        patch.setattr(torch, "get_rng_state", noted_rng_state)
        copy = case.fresh()
        own = [*copy.model.parameters(), *copy.model.buffers()]
        for name, parameter in copy.model.named_parameters():
            parameter.requires_grad_(name in train)
        root = copy.run().grad_fn
        del copy, parameter
        gc.collect()
    events = profiler.profiler.kineto_results.events()
    allocated = sum(event.nbytes() for event in events if event.name() == "[memory]")
    own_bytes = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in own}.values())
    rng_bytes = 5056 * sum(not state.expired() for state in rng_states)
    assert saved_bytes == allocated - own_bytes - rng_bytes - _number_bytes(root)


def _number_bytes(root: Any) -> int:
    """Bytes of the Python numbers that the C++ nodes behind ``root`` keep as tensors."""
    numbers: dict[int, int] = {}
    stack, seen = [root], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [behind for behind, _ in node.next_functions]
        for attribute in dir(node):
            if attribute.startswith("_raw_saved_") and not isinstance(node, torch.autograd.function.BackwardCFunction):
                raw = getattr(node, attribute)
                for saved in raw if isinstance(raw, (list, tuple)) else (raw,):
                    data = saved.data
                    if isinstance(data, Tensor) and data.dim() == 0 and data.dtype in (torch.float64, torch.int64):
                        numbers[data.untyped_storage()._cdata] = data.untyped_storage().nbytes()
    return sum(numbers.values())


@pytest.mark.parametrize(
    "name", ["mlp", "shared_layer_thrice", "mnist_cnn", "resnet18", "unet", "conv_3d", "two_towers"]
)
@pytest.mark.parametrize("method", ["freeze", "optimizer-only"])
def test_flops_are_what_torch_counts_where_torch_is_right(name, method):
    case = CASES[name]()
    for label, train in subsets_for(case).items():
        truth = measure(case, train, method)
        copy = case.fresh()
        for parameter_name, parameter in copy.model.named_parameters():
            parameter.requires_grad_(method == "optimizer-only" or parameter_name in train)
        with FlopCounterMode(display=False) as counter:
            loss = copy.run()
            forward_flops = counter.get_total_flops()
            loss.backward()
        assert truth.forward_flops == forward_flops, label
        assert sum(backward(truth)) == counter.get_total_flops() - forward_flops, label


# The zoo -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("builder", ALL, ids=lambda builder: builder.name)
def test_every_case_runs_by_every_method_and_twice_alike(builder):
    skip_if_missing(builder)
    case = builder()
    subsets = subsets_for(case)
    ran = 0
    for label in ["all", list(subsets)[-1]]:
        for method in METHODS:
            try:
                truth = measure(case, subsets[label], method)
            except (Refused, Unreachable):
                continue
            ran += 1
            assert truth == measure(case, subsets[label], method), (label, method)
            assert truth.forward_flops > 0
            assert truth.trained_with_grad <= set(subsets[label])
    assert ran >= 2


@pytest.mark.parametrize("builder", ALL, ids=lambda builder: builder.name)
def test_every_case_trains_alike_under_the_recorder(builder):
    """Watching changes no gradient: the recorder's hooks and patches are transparent."""
    from tests.truth.reference import _Recorder

    skip_if_missing(builder)
    gradients = []
    for watched in (False, True):
        case = builder()
        for name in trainable_names(case.model):
            case.model.get_parameter(name).requires_grad_()
        if watched:
            with _Recorder(case.model) as recorder:
                loss = case.run()
                recorder.phase = "backward"
                loss.backward()
        else:
            case.run().backward()
        gradients.append({name: p.grad for name, p in case.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, rtol=0, atol=0, msg=name)


def test_subsets_are_many_distinct_and_repeatable():
    for builder in ALL:
        if builder.missing:
            continue
        case = builder()
        subsets = subsets_for(case)
        assert subsets == subsets_for(builder())
        assert len({frozenset(s) for s in subsets.values()}) == len(subsets)
        assert len(subsets) >= min(12, 2 ** len(trainable_names(case.model)) - 1, 7)
