"""Each formula is held to a loop that computes the op number by number and counts: ``brute_force.py``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.costing import brute_force as bf
from tests.costing.brute_force import Counter
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from frostline.costing.formulas import flops, register_flops, unregister_flops
from frostline.costing.formulas.free import FREE, is_free
from frostline.costing.formulas.registry import FORMULAS, bind
from frostline.errors import FrostlineError

aten = torch.ops.aten


def meta(value: Any) -> Any:
    """What a probe hands to ``flops``: no tensor, so a formula that calls a method of one fails."""
    if isinstance(value, Tensor):
        return SimpleNamespace(
            shape=tuple(value.shape), dtype=value.dtype, stride=value.stride(), device=value.device, layout=value.layout
        )
    return type(value)(map(meta, value)) if isinstance(value, (list, tuple)) else value


def flatten(result: Any) -> tuple[Any, ...]:
    if isinstance(result, (list, tuple)):
        return tuple(leaf for item in result for leaf in flatten(item))
    return (result,)


def call(op: Any, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], tuple[int, ...] | None]:
    """Run an op: its outputs, and what we say they cost."""
    outputs = flatten(op(*args, **kwargs))
    each = flops(op, meta(args), {name: meta(value) for name, value in kwargs.items()}, meta(outputs))
    assert each is None or len(each) == len(outputs)
    return outputs, each


def count(op: Any, *args: Any, outputs: tuple[Any, ...] = (), **kwargs: Any) -> tuple[int, ...] | None:
    """What we say a call costs, without running it: for kernels of devices that are not here."""
    return flops(op, meta(args), {name: meta(value) for name, value in kwargs.items()}, meta(outputs))


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)


def assert_equal(ours: Any, theirs: Tensor, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(np.asarray(ours), theirs.detach().double().numpy(), rtol=tolerance, atol=tolerance)


class Recorder(TorchDispatchMode):
    """Every op below autograd, with what we say it costs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[int, ...] | None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, count(func, *args, outputs=flatten(result), **(kwargs or {}))))
        return result

    def total(self) -> int:
        assert all(each is not None for _, each in self.calls), [op for op, each in self.calls if each is None]
        return sum(sum(each) for _, each in self.calls if each)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# --- matrix products ---------------------------------------------------------------------------------------------

x, w, batch_x, batch_w = random(3, 4), random(4, 5), random(2, 3, 4), random(2, 4, 5)

PRODUCTS = {
    "mm": (aten.mm.default, (x, w), [(x, w)]),
    "mm.out": (aten.mm.out, (x, w), [(x, w)]),
    "addmm": (aten.addmm.default, (zeros(5), x, w), [(x, w)]),
    "addmm_": (aten.addmm_.default, (zeros(3, 5), x, w), [(x, w)]),
    "_addmm_activation": (aten._addmm_activation.default, (zeros(5), x, w), [(x, w)]),
    "mv": (aten.mv.default, (x, w[:, 0]), [(x, w[:, :1])]),
    "addmv": (aten.addmv.default, (zeros(3), x, w[:, 0]), [(x, w[:, :1])]),
    "dot": (aten.dot.default, (x[0], w[:, 0]), [(x[:1], w[:, :1])]),
    "vdot": (aten.vdot.default, (x[0], w[:, 0]), [(x[:1], w[:, :1])]),
    "bmm": (aten.bmm.default, (batch_x, batch_w), list(zip(batch_x, batch_w, strict=True))),
    "baddbmm": (aten.baddbmm.default, (zeros(3, 5), batch_x, batch_w), list(zip(batch_x, batch_w, strict=True))),
    "addbmm": (aten.addbmm.default, (zeros(3, 5), batch_x, batch_w), list(zip(batch_x, batch_w, strict=True))),
    "linear": (aten.linear.default, (x, w.T.contiguous(), zeros(5)), [(x, w)]),
    "matmul": (aten.matmul.default, (batch_x, w), [(batch_x.reshape(6, 4), w)]),
}
if hasattr(aten, "_foreach_mm"):  # from torch 2.12 or 2.13 on
    PRODUCTS["_foreach_mm"] = (aten._foreach_mm.default, ([x, batch_x[0]], [w, w]), [(x, w), (batch_x[0], w)])


def put_together(name: str, products: list[np.ndarray]) -> list[np.ndarray]:
    """What the op does with its products besides, all of it free: here nothing is added to them."""
    if name == "_foreach_mm":
        return products
    if name == "addbmm":
        return [sum(products, start=np.zeros(()))]
    joined = np.stack(products)
    return [np.maximum(joined, 0) if name == "_addmm_activation" else joined]


@pytest.mark.parametrize("name", PRODUCTS)
def test_matrix_products_count_their_multiply_adds(name: str) -> None:
    op, args, pairs = PRODUCTS[name]
    outputs, each = call(op, *args, **({"out": zeros(3, 5)} if name == "mm.out" else {}))
    counter = Counter()
    products = [bf.matmul(counter, left.numpy(), right.numpy()) for left, right in pairs]
    for ours, theirs in zip(put_together(name, products), outputs, strict=True):
        assert_equal(ours.reshape(theirs.shape), theirs)
    assert each is not None
    assert sum(each) == counter.flops


def test_a_complex_multiply_add_is_four_real_ones() -> None:
    a, b = torch.randn(2, 3, dtype=torch.complex128), torch.randn(3, 2, dtype=torch.complex128)
    counter = Counter()
    parts = {
        (i, j): bf.matmul(counter, getattr(a, i).numpy(), getattr(b, j).numpy())
        for i in ("real", "imag")
        for j in ("real", "imag")
    }
    assert_equal(parts["real", "real"] - parts["imag", "imag"], (a @ b).real)
    assert call(aten.mm.default, a, b)[1] == (counter.flops,)


def test_int_mm() -> None:
    a, b = torch.randint(-5, 5, (32, 8), dtype=torch.int8), torch.randint(-5, 5, (8, 8), dtype=torch.int8)
    (result,), each = call(aten._int_mm.default, a, b)
    counter = Counter()
    assert_equal(bf.matmul(counter, a.numpy().astype(float), b.numpy().astype(float)), result)
    assert each == (counter.flops,)


def test_scaled_mm() -> None:
    a, b = torch.randint(-3, 4, (16, 16)).float(), torch.randint(-3, 4, (16, 16)).float()
    one = torch.ones(())
    low, low_b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    (result,), each = call(aten._scaled_mm.default, low, low_b.T, one, one, out_dtype=torch.float32)
    counter = Counter()
    assert_equal(bf.matmul(counter, a.double().numpy(), b.T.double().numpy()), result)
    assert each == (counter.flops,)


def test_weight_int8pack_mm() -> None:
    a, packed = torch.randint(-3, 4, (4, 32)).float(), torch.randint(-5, 5, (16, 32), dtype=torch.int8)
    (result,), each = call(aten._weight_int8pack_mm.default, a, packed, torch.ones(16))
    counter = Counter()
    assert_equal(bf.matmul(counter, a.double().numpy(), packed.double().numpy().T), result)
    assert each == (counter.flops,)


@pytest.mark.parametrize("kind", ["rows", "columns", "inner", "batched"])
def test_grouped_mm(kind: str) -> None:
    offs = torch.tensor([8, 24], dtype=torch.int32)
    ends = [(0, 8), (8, 24)]
    a, b = torch.randint(-3, 4, (24, 8)).float(), torch.randint(-3, 4, (2, 8, 16)).float()
    if kind == "rows":
        left, right = a, b
        groups = [(a[start:end], b[g]) for g, (start, end) in enumerate(ends)]
    elif kind == "columns":
        left, right = b.transpose(1, 2), a.T
        groups = [(b[g].T, a.T[:, start:end]) for g, (start, end) in enumerate(ends)]
    elif kind == "inner":
        left, right = a.T, a
        groups = [(a.T[:, start:end], a[start:end]) for start, end in ends]
    else:
        left, right, offs = b.transpose(1, 2), b, None  # type: ignore[assignment]
        groups = list(zip(left, right, strict=True))
    (result,), each = call(aten._grouped_mm.default, left.bfloat16(), right.bfloat16(), offs)
    counter = Counter()
    products = [bf.matmul(counter, one.double().numpy(), other.double().numpy()) for one, other in groups]
    joined = {"rows": np.concatenate, "columns": np.hstack, "inner": np.stack, "batched": np.stack}[kind](products)
    assert_equal(joined, result, tolerance=0.01)  # bf16
    assert each == (counter.flops,)


def test_linear_backward_skips_what_the_mask_leaves_out() -> None:
    grad = random(3, 5)
    op = aten.linear_backward.default
    for mask in ([True, True, True], [True, False, False], [False, True, False]):
        each = count(op, x, grad, w.T, mask, outputs=(x, w.T, w[0]))
        grad_input, grad_weight = Counter(), Counter()
        bf.matmul(grad_input, grad.numpy(), w.T.numpy())
        bf.matmul(grad_weight, grad.T.numpy(), x.numpy())
        assert each == (grad_input.flops * mask[0], grad_weight.flops * mask[1], 0)
        assert count(aten.matmul_backward.default, grad, x, w, mask[:2], outputs=(x, w)) == each[:2]


def test_affine_grid_multiplies_every_position_with_theta() -> None:
    theta = random(2, 2, 3)
    (grid,), each = call(aten.affine_grid_generator.default, theta, [2, 1, 3, 4], True)
    counter = Counter()
    places = [[x, y, 1.0] for y in np.linspace(-1, 1, 3) for x in np.linspace(-1, 1, 4)]
    ours = [bf.matmul(counter, np.array(places), one.numpy().T) for one in theta]
    assert_equal(np.reshape(ours, (2, 3, 4, 2)), grid)
    assert each == (counter.flops,)


@pytest.mark.parametrize("num_rows", [3, 26])
def test_cdist_is_a_product_only_above_25_rows(num_rows: int) -> None:
    a, b = random(num_rows, 3), random(2, 3)
    with Recorder() as recorder:
        result = torch.cdist(a, b)
    counter = Counter()
    wide_a = np.hstack([-2 * a.numpy(), (a**2).sum(1, keepdim=True).numpy(), np.ones((num_rows, 1))])
    wide_b = np.hstack([b.numpy(), np.ones((2, 1)), (b**2).sum(1, keepdim=True).numpy()])
    assert_equal(np.sqrt(bf.matmul(counter, wide_a, wide_b.T)), result)
    assert recorder.total() == (counter.flops if num_rows > 25 else 0)
    assert call(aten._cdist_forward.default, a, b, 2.0, 1)[1] == (counter.flops,)
    assert call(aten._cdist_forward.default, a, b, 2.0, 2)[1] == (0,)


def test_bilinear_counts_two_contractions_forward_and_one_for_each_gradient() -> None:
    layer = nn.Bilinear(3, 4, 5, bias=False).double()
    left, right, grad = random(2, 3).requires_grad_(), random(2, 4).requires_grad_(), random(2, 5)
    with Recorder() as forward:
        result = layer(left, right)
    with Recorder() as backward:
        result.backward(grad)
    weight, l, r, g = (t.detach().numpy() for t in (layer.weight, left, right, grad))  # noqa: E741
    counters = {name: Counter() for name in ("forward", "grad_left", "grad_right", "grad_weight")}
    output, grad_left, grad_right, grad_weight = np.zeros((2, 5)), np.zeros((2, 3)), np.zeros((2, 4)), []
    for o in range(5):
        product = bf.matmul(counters["forward"], l, weight[o])
        for b in range(2):
            output[b, o] = bf.matmul(counters["forward"], product[b : b + 1], r[b : b + 1].T)[0, 0]
        # The gradient of the output scales by the element; slices are added up by the element.
        for b in range(2):
            grad_left[b] += bf.matmul(counters["grad_left"], r[b : b + 1], (g[b, o] * weight[o]).T)[0]
        grad_right += bf.matmul(counters["grad_right"], l, weight[o]) * g[:, o, None]
        grad_weight.append(bf.matmul(counters["grad_weight"], (l * g[:, o, None]).T, r))
    assert_equal(output, result)
    for ours, tensor in ((grad_left, left), (grad_right, right), (grad_weight, layer.weight)):
        assert tensor.grad is not None
        assert_equal(ours, tensor.grad)
    assert forward.total() == counters["forward"].flops
    trilinear = [each[0] for op, each in backward.calls if op is aten._trilinear.default and each]
    assert sorted(trilinear) == sorted(counters[f"grad_{name}"].flops for name in ("left", "right", "weight"))


# --- convolutions ------------------------------------------------------------------------------------------------

#                 input          weight        stride  padding dilation transposed output_padding groups
CONVOLUTIONS = {
    "1d": ((2, 3, 7), (4, 3, 3), (1,), (0,), (1,), False, (0,), 1),
    "1d strided, padded, dilated": ((2, 2, 9), (3, 2, 3), (2,), (2,), (2,), False, (0,), 1),
    "1d grouped": ((2, 4, 5), (6, 2, 2), (1,), (1,), (1,), False, (0,), 2),
    "1d depthwise": ((1, 3, 5), (6, 1, 2), (1,), (1,), (1,), False, (0,), 3),
    "1d transposed": ((2, 3, 4), (3, 2, 3), (1,), (0,), (1,), True, (0,), 1),
    "1d transposed, every option": ((2, 4, 3), (4, 3, 3), (2,), (1,), (2,), True, (1,), 2),
    "2d": ((2, 2, 4, 5), (3, 2, 2, 3), (1, 1), (0, 0), (1, 1), False, (0, 0), 1),
    "2d uneven, grouped": ((1, 4, 5, 6), (2, 2, 3, 2), (2, 1), (1, 2), (1, 2), False, (0, 0), 2),
    "2d pointwise": ((2, 3, 2, 2), (4, 3, 1, 1), (1, 1), (0, 0), (1, 1), False, (0, 0), 1),
    "2d transposed, grouped": ((1, 4, 3, 2), (4, 1, 2, 3), (2, 2), (1, 0), (1, 1), True, (1, 0), 2),
    "3d": ((1, 2, 3, 3, 4), (2, 2, 2, 1, 2), (1, 2, 1), (0, 0, 1), (1, 1, 1), False, (0, 0, 0), 1),
    "3d transposed": ((1, 2, 2, 3, 2), (2, 1, 2, 1, 2), (1, 2, 1), (0, 0, 1), (1, 1, 1), True, (0, 1, 0), 1),
    "empty batch": ((0, 2, 5), (3, 2, 2), (1,), (0,), (1,), False, (0,), 1),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_forward(name: str) -> None:
    input_shape, weight_shape, *options = CONVOLUTIONS[name]
    inputs, weight = random(*input_shape), random(*weight_shape)
    (outputs,), each = call(aten.convolution.default, inputs, weight, None, *options)
    counter = Counter()
    assert_equal(bf.Convolution(*options).forward(counter, inputs.numpy(), weight.numpy(), outputs.shape), outputs)
    assert each == (counter.flops,)


@pytest.mark.parametrize("mask", [(True, True, True), (True, False, False), (False, True, True)])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_backward_is_a_count_for_each_gradient(name: str, mask: tuple[bool, ...]) -> None:
    input_shape, weight_shape, *options = CONVOLUTIONS[name]
    inputs, weight = random(*input_shape), random(*weight_shape)
    grad = torch.randn_like(aten.convolution.default(inputs, weight, None, *options))
    num_out = grad.shape[1]
    outputs, each = call(aten.convolution_backward.default, grad, inputs, weight, [num_out], *options, list(mask))
    grad_input, grad_weight = Counter(), Counter()
    loops = bf.Convolution(*options)
    values = (
        loops.grad_input(grad_input, grad.numpy(), inputs.numpy(), weight.numpy()),
        loops.grad_weight(grad_weight, grad.numpy(), inputs.numpy(), weight.numpy()),
    )
    for ours, theirs, wanted in zip(values, outputs, mask, strict=False):
        assert (theirs is not None) == wanted
        if wanted:
            assert_equal(ours, theirs)
    assert each == (grad_input.flops * mask[0], grad_weight.flops * mask[1], 0)


def test_other_convolution_kernels_count_the_same() -> None:
    inputs, weight = random(1, 4, 5, 5), random(4, 4, 3, 3)
    two, rest = ([1, 1], [0, 0]), ([0, 0], [1, 1], [1, 1], 1)
    expected = call(aten.convolution.default, inputs, weight, None, *two, [1, 1], False, [0, 0], 1)[1]
    (outputs,), each = call(aten._slow_conv2d_forward.default, inputs, weight, [3, 3], None, *two)
    assert each == expected
    assert call(aten.conv2d.default, inputs, weight)[1] == expected
    assert call(aten.slow_conv_dilated2d.default, inputs, weight, [3, 3])[1] == expected
    assert (
        count(aten.cudnn_convolution.default, inputs, weight, *rest, False, False, True, outputs=(outputs,)) == expected
    )
    assert count(aten.mkldnn_convolution.default, inputs, weight, None, *rest, outputs=(outputs,)) == expected
    op, args = aten._slow_conv2d_backward.output_mask, (outputs, inputs, weight, [3, 3], *two, [True, False, False])
    assert expected is not None
    assert call(op, *args)[1] == (*expected, 0, 0)
    expected = call(aten.convolution.default, inputs, weight, None, *two, [1, 1], True, [0, 0], 1)[1]
    assert call(aten.slow_conv_transpose2d.default, inputs, weight, [3, 3])[1] == expected
    assert call(aten.conv_transpose2d.input, inputs[0], weight)[1] == expected


@pytest.mark.parametrize("pad", [0, 1, 3])
def test_conv_tbc_leaves_out_the_taps_on_padding(pad: int) -> None:
    inputs, weight = random(4, 2, 3), random(3, 3, 2)
    (outputs,), each = call(aten.conv_tbc.default, inputs, weight, torch.zeros(2).double(), pad)
    counter = Counter()
    assert_equal(bf.conv_tbc(counter, inputs.numpy(), weight.numpy(), pad), outputs)
    assert each == (counter.flops,)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_torch_counts_a_grouped_weight_gradient_groups_times(groups: int) -> None:
    inputs, weight = random(1, 4, 6, 6), random(8, 4 // groups, 3, 3)
    options: list[Any] = [[1, 1], [0, 0], [1, 1], False, [0, 0], groups]
    grad = torch.randn_like(aten.convolution.default(inputs, weight, None, *options))
    args = (grad, inputs, weight, [8], *options, [False, True, False])
    with FlopCounterMode(display=False) as theirs:
        aten.convolution_backward.default(*args)
    ours = call(aten.convolution_backward.default, *args)[1]
    assert ours is not None
    assert theirs.get_total_flops() == groups * sum(ours)


# --- attention ---------------------------------------------------------------------------------------------------

ATTENTION_SHAPES = {  # query, key and value
    "self": ((2, 2, 4, 8), (2, 2, 4, 8)),
    "cross": ((1, 2, 3, 8), (1, 2, 5, 8)),
    "grouped queries": ((1, 4, 3, 8), (1, 2, 5, 8)),
}
PRODUCTS_OF_BACKWARD = ("scores", "grad_probabilities", "grad_query", "grad_key", "grad_value")


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", ATTENTION_SHAPES)
def test_attention_runs_two_products_forward_and_five_backward(name: str, is_causal: bool) -> None:
    query_shape, key_shape = ATTENTION_SHAPES[name]
    query, key, value, grad = random(*query_shape), random(*key_shape), random(*key_shape), random(*query_shape)
    q, k, v, g = (tensor.numpy() for tensor in (query, key, value, grad))
    mask = np.triu(np.full((query_shape[2], key_shape[2]), -np.inf), 1) if is_causal else 0.0

    outputs, each = call(aten._scaled_dot_product_flash_attention_for_cpu.default, query, key, value, 0.0, is_causal)
    forward = Counter()
    assert_equal(bf.attention(forward, q, k, v, mask), outputs[0])
    assert each == (forward.flops, 0)

    op = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    grads, each = call(op, grad, query, key, value, *outputs, 0.0, is_causal)
    counters = {name: Counter() for name in PRODUCTS_OF_BACKWARD}
    for ours, theirs in zip(bf.attention_backward(counters, g, q, k, v, mask), grads, strict=True):
        assert_equal(ours, theirs, tolerance=1e-6)
    of = {name: counter.flops for name, counter in counters.items()}
    assert each == (of["grad_query"] + of["grad_probabilities"], of["grad_key"], of["grad_value"] + of["scores"])


def test_attention_kernels_of_other_devices_count_the_same() -> None:
    q, k, v = random(2, 4, 3, 8), random(2, 2, 5, 8), random(2, 2, 5, 16)  # the loops allow values of another width
    out, lse = random(2, 4, 3, 16), random(2, 4, 3)
    forward, counters = Counter(), {name: Counter() for name in PRODUCTS_OF_BACKWARD}
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert_equal(bf.attention(forward, q.numpy(), k.numpy(), v.numpy()), expected)
    bf.attention_backward(counters, out.numpy(), q.numpy(), k.numpy(), v.numpy())
    backward = sum(counter.flops for counter in counters.values())

    for name in ("flash", "efficient", "cudnn", "fused"):
        suffix = "_overrideable" if name == "fused" else ""
        op = getattr(aten, f"_scaled_dot_product_{name}_attention{suffix}").default
        rest = {"flash": (), "fused": ()}.get(name, (None, True))
        assert count(op, q, k, v, *rest, outputs=(out, lse)) == (forward.flops, 0)
        op = getattr(aten, f"_scaled_dot_product_{name}_attention{suffix}_backward").default
        kwargs = dict.fromkeys([argument.name for argument in op._schema.arguments if argument.name != "scale"])
        kwargs |= {"query": q, "key": k, "value": v}
        each = count(op, outputs=(q, k, v), **kwargs)
        assert each is not None
        assert sum(each) == backward

    sequence_first = [tensor.transpose(1, 2) for tensor in (q, k, v)]
    flash = aten._flash_attention_forward.default
    assert count(flash, *sequence_first, None, None, 3, 5, 0.0, False, False, outputs=(out,)) == (forward.flops,)
    lengths = torch.tensor([0, 3, 6])
    packed = [tensor.flatten(0, 1) for tensor in sequence_first]
    assert count(flash, *packed, lengths, lengths, 3, 5, 0.0, False, False, outputs=(out,)) is None
    op = aten._efficient_attention_backward.default
    kwargs = dict.fromkeys([argument.name for argument in op._schema.arguments])
    kwargs |= dict(zip(("query", "key", "value"), sequence_first, strict=True))
    each = count(op, outputs=(q, k, v, None), **kwargs)
    assert each is not None
    assert sum(each) == backward


def test_torch_counts_nothing_for_attention_on_cpu() -> None:
    q = random(1, 1, 4, 8)
    with FlopCounterMode(display=False) as theirs:
        aten._scaled_dot_product_flash_attention_for_cpu.default(q, q, q)
    assert theirs.get_total_flops() == 0


def heads(tensor: np.ndarray, num_heads: int) -> np.ndarray:
    return tensor.reshape(*tensor.shape[:2], num_heads, -1).transpose(0, 2, 1, 3)


def brute_self_attention(counter: Counter, module: nn.MultiheadAttention, inputs: np.ndarray) -> np.ndarray:
    weight, bias = (p.detach().double().numpy() for p in (module.in_proj_weight, module.in_proj_bias))
    projected = np.stack([bf.matmul(counter, one, weight.T) + bias for one in inputs])
    q, k, v = (heads(part, module.num_heads) for part in np.split(projected, 3, axis=2))
    joined = bf.attention(counter, q, k, v).transpose(0, 2, 1, 3).reshape(inputs.shape)
    out = module.out_proj
    return np.stack(
        [bf.matmul(counter, one, out.weight.detach().double().numpy().T) + out.bias.detach().numpy() for one in joined]
    )


@torch.no_grad()
def test_fused_multi_head_attention() -> None:
    module = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    inputs = torch.randn(2, 3, 8)
    with Recorder() as recorder:
        result = module(inputs, inputs, inputs, need_weights=False)[0]
    assert aten._native_multi_head_attention.default in [op for op, _ in recorder.calls]
    counter = Counter()
    assert_equal(brute_self_attention(counter, module, inputs.double().numpy()), result, tolerance=1e-5)
    assert recorder.total() == counter.flops


@torch.no_grad()
def test_fused_encoder_layer() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    inputs = torch.randn(2, 3, 8)
    with Recorder() as recorder:
        result = layer(inputs)
    assert [op for op, _ in recorder.calls] == [aten._transformer_encoder_layer_fwd.default]
    counter = Counter()
    attended = torch.from_numpy(brute_self_attention(counter, layer.self_attn, inputs.double().numpy())).float()
    hidden = layer.norm1(inputs + attended)
    for linear in (layer.linear1, layer.linear2):
        product = [bf.matmul(counter, one.double().numpy(), linear.weight.double().numpy().T) for one in hidden]
        bent = torch.from_numpy(np.stack(product)).float() + linear.bias
        hidden = torch.relu(bent) if linear is layer.linear1 else layer.norm2(layer.norm1(inputs + attended) + bent)
    assert_equal(hidden, result, tolerance=1e-4)
    assert recorder.total() == counter.flops


# --- recurrent layers --------------------------------------------------------------------------------------------


def lstm_loops(module: nn.LSTM, suffix: str) -> bf.Lstm:
    p = {name: value.detach().double().numpy() for name, value in module.named_parameters()}
    return bf.Lstm(p[f"weight_ih_{suffix}"], p[f"weight_hh_{suffix}"], p[f"bias_ih_{suffix}"] + p[f"bias_hh_{suffix}"])


def test_onednn_lstm_forward_and_backward() -> None:
    module, inputs, grad = nn.LSTM(3, 4), torch.randn(5, 2, 3, requires_grad=True), torch.randn(5, 2, 4)
    hx, cx = torch.randn(1, 2, 4, requires_grad=True), torch.randn(1, 2, 4, requires_grad=True)
    with Recorder() as recorder:
        outputs, _ = module(inputs, (hx, cx))
        outputs.backward(grad)
    costs = dict(recorder.calls)

    loops, forward = lstm_loops(module, "l0"), Counter()
    state = [tensor[0].detach().double().numpy() for tensor in (hx, cx)]
    assert_equal(loops.forward(forward, inputs.detach().double().numpy(), *state)[0], outputs, tolerance=1e-5)
    assert costs[aten.mkldnn_rnn_layer.default] == (forward.flops, 0, 0, 0)

    counters = {name: Counter() for name in ("grad_input", "grad_w_ih", "grad_w_hh", "grad_hx")}
    d_x, d_ih, d_hh, d_bias, d_h, d_c = loops.backward(counters, grad.double().numpy())
    leaves = (inputs, *module.parameters(), hx, cx)
    for ours, leaf in zip((d_x, d_ih, d_hh, d_bias, d_bias, d_h, d_c), leaves, strict=True):
        assert leaf.grad is not None
        assert_equal(ours, leaf.grad.reshape(ours.shape), tolerance=1e-4)
    of = {name: counter.flops for name, counter in counters.items()}
    expected = (of["grad_input"], of["grad_w_ih"], of["grad_w_hh"], 0, 0, of["grad_hx"], 0)
    assert costs[aten.mkldnn_rnn_layer_backward.default] == expected
    assert recorder.total() == forward.flops + sum(expected)


def test_cudnn_rnn_counts_every_layer_and_direction() -> None:
    module, inputs = nn.LSTM(3, 4, num_layers=2, bidirectional=True), torch.randn(5, 2, 3)
    zero, forward, hidden, backward = np.zeros((2, 4)), Counter(), inputs.double().numpy(), []
    for layer in range(2):
        ahead, back = lstm_loops(module, f"l{layer}"), lstm_loops(module, f"l{layer}_reverse")
        sides = [
            ahead.forward(forward, hidden, zero, zero)[0],
            back.forward(forward, hidden[::-1], zero, zero)[0][::-1],
        ]
        hidden = np.concatenate(sides, axis=2)
        backward += [ahead, back]
    assert_equal(hidden, module(inputs)[0], tolerance=1e-5)

    weights, state = [p.detach() for p in module.parameters()], torch.zeros(4, 2, 4)
    options = (2, 4, 0, 2, False, 0.0, True, True, [], None)
    args = (inputs, weights, 4, None, state, state, *options)
    assert count(aten._cudnn_rnn.default, *args, outputs=(inputs, state, state, None, None)) == (
        forward.flops,
        0,
        0,
        0,
        0,
    )

    counters = [{name: Counter() for name in ("grad_input", "grad_w_ih", "grad_w_hh", "grad_hx")} for _ in backward]
    for loops, counter in zip(backward, counters, strict=True):
        loops.backward(counter, np.zeros((5, 2, 4)))
    data = [sum(counter[name].flops for counter in counters) for name in ("grad_input", "grad_hx")]
    grad_weights = [n for c in counters for n in (c["grad_w_ih"].flops, c["grad_w_hh"].flops, 0, 0)]
    args = (inputs, weights, 4, weights[0], state, state, inputs, inputs, None, None, *options, inputs)
    op = aten._cudnn_rnn_backward.default
    everything = count(op, *args, [True] * 4, outputs=(inputs, state, state, *weights))
    assert everything == (*data, 0, *grad_weights)
    assert count(op, *args, [True, True, True, False], outputs=(inputs, state, state)) == (*data, 0)


@pytest.mark.parametrize("cell", [nn.GRU, nn.RNN])
def test_other_recurrent_layers_are_separate_products_on_cpu(cell: Any) -> None:
    module, inputs = cell(3, 4), torch.randn(5, 2, 3)
    with Recorder() as recorder:
        module(inputs)
    weights = [p for p in module.parameters() if p.dim() == 2]
    assert recorder.total() == sum(2 * 5 * 2 * weight.numel() for weight in weights)


# --- direct solvers ----------------------------------------------------------------------------------------------


def well_behaved(n: int) -> Tensor:
    matrix = random(n, n)
    return matrix @ matrix.T + n * torch.eye(n).double()


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("unit", [False, True])
def test_solve_triangular(upper: bool, unit: bool) -> None:
    matrix, right = well_behaved(4), random(4, 3)
    (result,), each = call(aten.linalg_solve_triangular.default, matrix, right, upper=upper, unitriangular=unit)
    counter = Counter()
    assert_equal(bf.substitute(counter, matrix.numpy(), right.numpy(), upper=upper, unit=unit), result)
    assert each == (counter.flops,)
    batched = call(aten.linalg_solve_triangular.default, matrix, random(2, 4, 3), upper=upper, unitriangular=unit)[1]
    assert batched == (2 * counter.flops,)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_cholesky(n: int) -> None:
    matrix, right = well_behaved(n), random(n, 2)
    (lower, _), each = call(aten.linalg_cholesky_ex.default, matrix)
    factoring, solving = Counter(), Counter()
    ours = bf.cholesky(factoring, matrix.numpy())
    assert_equal(ours, lower)
    assert each == (factoring.flops, 0)
    assert call(aten.linalg_cholesky_ex.default, torch.stack([matrix] * 3))[1] == (3 * factoring.flops, 0)

    (result,), each = call(aten.cholesky_solve.default, right, lower)
    middle = bf.substitute(solving, ours, right.numpy(), upper=False)
    assert_equal(bf.substitute(solving, ours.T, middle, upper=True), result)
    assert each == (solving.flops,)


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (5, 3), (3, 5)])
def test_lu(shape: tuple[int, int]) -> None:
    matrix = random(*shape)
    (factors, _, _), each = call(aten.linalg_lu_factor_ex.default, matrix)
    counter = Counter()
    assert_equal(bf.lu(counter, matrix.numpy())[0], factors)
    assert each == (counter.flops, 0, 0)


def test_what_is_made_of_lu() -> None:
    matrix, right = random(4, 4), random(4, 2)
    factoring, solving, inverting = Counter(), Counter(), Counter()
    ours, rows = bf.lu(factoring, matrix.numpy())
    (factors, pivots, _), _ = call(aten.linalg_lu_factor_ex.default, matrix)
    (solution,), each = call(aten.linalg_lu_solve.default, factors, pivots, right)
    assert_equal(bf.lu_solve(solving, ours, rows, right.numpy()), solution)
    assert each == (solving.flops,)

    outputs, each = call(aten._linalg_solve_ex.default, matrix, right)
    assert_equal(bf.lu_solve(Counter(), ours, rows, right.numpy()), outputs[0])
    assert each == (factoring.flops + solving.flops, 0, 0, 0)

    outputs, each = call(aten.linalg_inv_ex.default, matrix)
    assert_equal(bf.lu_solve(inverting, ours, rows, np.eye(4)), outputs[0])
    assert each == (factoring.flops + inverting.flops, 0)

    outputs, each = call(aten._linalg_det.default, matrix)
    assert abs(outputs[0]) == pytest.approx(abs(np.diag(ours).prod()))
    assert each == (factoring.flops, 0, 0)


# --- free, uncounted, registered ---------------------------------------------------------------------------------

FREE_CALLS = {
    "by the element": (aten.add.Tensor, (x, x)),
    "in place": (aten.mul_.Tensor, (x.clone(), x)),
    "out=": (aten.exp.out, (x,), {"out": torch.empty_like(x)}),
    "a list of tensors": (aten._foreach_add.Scalar, ([x, w], 1.0)),
    "a list, in place": (aten._foreach_mul_.Scalar, ([x.clone(), w.clone()], 2.0)),
    "outer product": (aten.addr.default, (x, x[:, 0], x[0])),
    "view": (aten.t.default, (x,)),
    "view in place": (aten.t_.default, (x.clone(),)),
    "view of several": (aten.unbind.int, (x,)),
    "copy": (aten._to_copy.default, (x,), {"dtype": torch.float32}),
    "factory": (aten.zeros.default, ([2, 3],)),
    "random": (aten.native_dropout.default, (x, 0.5, True)),
    "reduction": (aten.sum.dim_IntList, (x, [0])),
    "scan": (aten.cumsum.default, (x, 0)),
    "sort": (aten.sort.default, (x,)),
    "softmax": (aten._softmax.default, (x, -1, False)),
    "normalisation": (aten.native_layer_norm.default, (x, [4], None, None, 1e-5)),
    "pooling": (aten.max_pool2d_with_indices.default, (random(1, 1, 4, 4), [2, 2])),
    "interpolation": (aten.upsample_bilinear2d.default, (random(1, 1, 4, 4), [8, 8], False)),
    "embedding": (aten.embedding.default, (x, torch.tensor([0, 1]))),
    "embedding, backward": (aten.embedding_dense_backward.default, (x[:2], torch.tensor([0, 1]), 3, -1, False)),
    "element, backward": (aten.gelu_backward.default, (x, x)),
    "loss": (aten.mse_loss.default, (x, x)),
    "indexing": (aten.index.Tensor, (x, [torch.tensor([0])])),
    "asking": (aten._local_scalar_dense.default, (x[0, 0],)),
}


@pytest.mark.parametrize("name", FREE_CALLS)
def test_free_by_declaration(name: str) -> None:
    op, args, *kwargs = FREE_CALLS[name]
    outputs, each = call(op, *args, **(kwargs[0] if kwargs else {}))
    assert each == (0,) * len(outputs)


@pytest.mark.parametrize(
    "op",
    [
        aten.linalg_qr.default,
        aten._linalg_svd.default,
        aten._linalg_eigh.default,
        aten.linalg_matrix_exp.default,
        aten._fft_r2c.default,
        aten._sparse_addmm.default,
        aten.sparse_sampled_addmm.default,
        aten.einsum.default,
    ],
)
def test_what_has_no_trustworthy_count_is_uncounted(op: Any) -> None:
    assert count(op, outputs=(x,)) is None


def test_an_op_of_another_library_is_uncounted() -> None:
    op = torch.library.custom_op(
        "frostline_test::twice", lambda x: x * 2, mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    assert count(torch.ops.frostline_test.twice.default, x, outputs=(x,)) is None
    assert op is not None


@pytest.mark.filterwarnings("ignore:Sparse")
def test_a_sparse_product_is_uncounted() -> None:
    sparse = x.to_sparse()
    assert count(aten.mm.default, sparse, w, outputs=(random(3, 5),)) is None


def test_complex_solvers_are_uncounted() -> None:
    assert call(aten.linalg_cholesky_ex.default, torch.eye(2, dtype=torch.complex64))[1] is None


def overloads(name: str) -> list[Any]:
    namespace, _, base = name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), base, None)
    return [getattr(packet, overload) for overload in packet.overloads()] if packet else []


def test_no_op_is_both_counted_and_free() -> None:
    assert [op for name in FORMULAS for op in overloads(name) if is_free(op)] == []


@pytest.mark.skipif(torch.__version__ < "2.13", reason="the list is of torch 2.13")
def test_what_is_listed_as_free_exists_in_this_torch() -> None:
    def exists(name: str) -> bool:
        forms = (name, f"{name}_", f"{name}_forward", f"{name}_backward")
        return any(hasattr(getattr(torch.ops, space), form) for space in ("aten", "prim") for form in forms)

    assert [name for name in FREE if not exists(name)] == []


def test_bind_fills_in_defaults_and_takes_keywords() -> None:
    bound = bind(
        aten.convolution_backward.default, (), dict.fromkeys(a.name for a in _arguments(aten.convolution_backward))
    )
    assert set(bound) >= {"grad_output", "input", "weight", "transposed", "output_mask"}
    assert bind(aten._trilinear.default, (1, 2, 3, [], [], [], []), {})["unroll_dim"] == 1
    with pytest.raises(TypeError, match="mat2"):
        bind(aten.mm.default, (x,), {})


def _arguments(packet: Any) -> Any:
    return packet.default._schema.arguments


def test_a_registered_formula_goes_first_and_can_be_taken_back() -> None:
    op = aten.mm.default
    ours = count(op, x, w, outputs=(random(3, 5),))
    for registered in (op, aten.mm):

        @register_flops(registered)
        def formula(args: Any, kwargs: Any, outputs: Any) -> int:
            return 7 * args[0].shape[0]

        try:
            assert count(op, x, w, outputs=(random(3, 5),)) == (21,)
        finally:
            unregister_flops(registered)
        assert count(op, x, w, outputs=(random(3, 5),)) == ours


def test_a_registered_formula_must_fit_the_call() -> None:
    op = aten.linalg_qr.default
    register_flops(op)(lambda args, kwargs, outputs: (1, 2, 3))
    try:
        with pytest.raises(FrostlineError, match=r"linalg_qr.*counts 3 outputs.*has 2"):
            count(op, x, outputs=(x, x))
    finally:
        unregister_flops(op)


def test_real_tensors_do_as_well_as_metadata() -> None:
    assert flops(aten.mm.default, (x, w), {}, (x @ w,)) == count(aten.mm.default, x, w, outputs=(x @ w,))
