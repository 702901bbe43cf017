"""Every op x dtype x layout: results and gradients are those of plain PyTorch, to the bit."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from tests.cases import DEVICE
from tests.kernels.comparing import assert_bitwise, assert_same, run, tensor
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OPS = {
    "relu": F.relu,
    "relu_": F.relu_,
    "relu6": F.relu6,
    "relu6_": lambda x: F.relu6(x, inplace=True),
    "hardtanh": lambda x: F.hardtanh(x, -0.3, 2),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "leaky_relu_": lambda x: F.leaky_relu_(x, 0.1),
    "threshold": lambda x: F.threshold(x, 0.3, 7),
    "threshold_": lambda x: F.threshold_(x, 0.3, 7),
    "prelu": lambda x: F.prelu(x, torch.linspace(0.1, 0.4, 4, dtype=x.dtype)),
    "dropout": lambda x: F.dropout(x, 0.3),
    "dropout_": lambda x: F.dropout(x, 0.3, inplace=True),
    "native_dropout": lambda x: torch.native_dropout(x, 0.3, True)[0],
    "max_pool2d": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_pool2d, ceil": lambda x: F.max_pool2d(x, (2, 3), ceil_mode=True),
    "max_pool2d, dilated": lambda x: F.max_pool2d(x, 2, dilation=2),
    "max_pool2d, large": lambda x: F.max_pool2d(x, (8, 7), padding=(0, 3), stride=1),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 3),
    "batch_norm": lambda x: F.batch_norm(x, torch.ones(4, dtype=x.dtype), torch.ones(4, dtype=x.dtype) / 3),
}


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_same(op: str, dtype: torch.dtype, last: bool) -> None:
    for special in (True, False):
        for shape in ((2, 4, 9, 7), (3, 4, 17, 33), (1, 4, 8, 7)):
            assert_same(OPS[op], tensor(*shape, dtype=dtype, special=special, last=last).requires_grad_())


@pytest.mark.parametrize("op", ["relu", "relu6_", "leaky_relu", "threshold", "dropout", "dropout_", "native_dropout"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (8,), (9,), (3, 0, 2), (5, 300_000)], ids=str)
def test_sizes_that_are_no_multiple_of_eight(op: str, shape: tuple[int, ...]) -> None:
    assert_same(OPS[op], tensor(*shape, special=False).requires_grad_())


@pytest.mark.parametrize("bound", [0.3, 0.1, 1 / 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_next_to_a_bound(dtype: torch.dtype, bound: float) -> None:
    x = torch.tensor([bound, -bound], dtype=dtype).repeat_interleave(5)
    for i, step in enumerate((-2, -1, 0, 1, 2)):
        for _ in range(abs(step)):
            x[i::5] = (
                torch.nextafter(x[i::5].float(), torch.tensor(step * 9.0)).to(dtype) if dtype != DTYPES[1] else x[i::5]
            )
    assert_same(lambda x: F.threshold(x, bound, 7), x.clone().requires_grad_())
    assert_same(lambda x: F.hardtanh(x, -bound, bound), x.clone().requires_grad_())


@pytest.mark.parametrize(
    "op", ["relu", "relu6", "leaky_relu", "threshold", "dropout", "native_dropout", "avg_pool2d", "max_pool2d"]
)
def test_a_gradient_laid_out_otherwise(op: str) -> None:
    x = tensor(2, 4, 9, 7, last=True, special=False).requires_grad_()
    assert_same(lambda x: OPS[op](x).contiguous() * tensor(1), x)
    assert_same(lambda x: OPS[op](x.transpose(2, 3).contiguous()).transpose(2, 3), x)


@pytest.mark.parametrize("dims", [1, 3] if DEVICE == "cpu" else [1])  # (elsewhere eager adds up in no fixed order)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_pools_of_other_dimensions(dims: int, dtype: torch.dtype) -> None:
    x = tensor(2, 4, *(9, 8, 7)[:dims], dtype=dtype).requires_grad_()
    assert_same(lambda x: getattr(F, f"max_pool{dims}d")(x, 3, 2, 1), x)
    assert_same(lambda x: getattr(F, f"avg_pool{dims}d")(x, 3, 2, 1), x)
    assert_same(lambda x: getattr(F, f"adaptive_avg_pool{dims}d")(x, 3), x)
    assert_same(lambda x: getattr(F, f"max_pool{dims}d")(x[0], 3, 2, 1), x)


def test_max_pool_of_a_wide_image() -> None:
    """Offsets of more than a byte are numbered; ties go to the same element."""
    x = tensor(1, 2, 12, 300).round().requires_grad_()
    assert_same(lambda x: F.max_pool2d(x, 3, 2, 1), x)
    assert_same(lambda x: F.max_pool2d(x, 3, 1, 0, 4), x)
    assert_same(lambda x: F.max_pool2d(x.to(memory_format=torch.channels_last), (16, 16), 5, 8), x)


MASKS = [mask for mask in itertools.product((False, True), repeat=3) if any(mask)]
CONVOLUTIONS = {
    "1d": (lambda x, w, b: F.conv1d(x, w, b, 2, 1), (2, 4, 9), (6, 4, 3)),
    "2d": (lambda x, w, b: F.conv2d(x, w, b, 1, 1), (2, 4, 9, 7), (6, 4, 3, 3)),
    "2d, one by one": (lambda x, w, b: F.conv2d(x, w, b), (2, 4, 9, 7), (6, 4, 1, 1)),
    "2d, no batch": (lambda x, w, b: F.conv2d(x, w, b, 1, 1), (4, 9, 7), (6, 4, 3, 3)),
    "2d, same": (lambda x, w, b: F.conv2d(x, w, b, padding="same", dilation=2), (2, 4, 9, 7), (6, 4, 3, 2)),
    "2d, grouped, strided": (lambda x, w, b: F.conv2d(x, w, b, 2, 1, 2, 2), (2, 4, 19, 17), (6, 2, 3, 3)),
    "2d, depthwise": (lambda x, w, b: F.conv2d(x, w, b, 1, 1, 1, 4), (2, 4, 16, 16), (4, 1, 3, 3)),
    "2d, nothing": (lambda x, w, b: F.conv2d(x, w, b, 1, 1), (0, 4, 9, 7), (6, 4, 3, 3)),
    "3d": (lambda x, w, b: F.conv3d(x, w, b, 2, 1), (2, 4, 5, 6, 7), (6, 4, 3, 3, 3)),
    "1d, transposed": (lambda x, w, b: F.conv_transpose1d(x, w, b, 2, 1, 1), (2, 4, 9), (4, 6, 3)),
    "2d, transposed": (lambda x, w, b: F.conv_transpose2d(x, w, b, 2, 1, 1, 2), (2, 4, 9, 7), (4, 3, 3, 3)),
    "3d, transposed": (lambda x, w, b: F.conv_transpose3d(x, w, b, 2), (2, 4, 5, 6, 7), (4, 6, 2, 2, 2)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [(False, False), (True, True), (True, False), (False, True)], ids=str)
def test_convolutions(kind: str, dtype: torch.dtype, last: tuple[bool, bool]) -> None:
    """float64 too: backward is eager's own op, so that it chooses the same kernel."""
    function, shape, weight = CONVOLUTIONS[kind]
    if dtype is torch.float16 and "3d" in kind:
        pytest.skip("eager has no such kernel")
    for mask in MASKS:
        torch.manual_seed(0)
        x = tensor(*shape, dtype=dtype, special=False, last=last[0]).requires_grad_(mask[0])
        w = tensor(*weight, dtype=dtype, special=False, last=last[1]).requires_grad_(mask[1])
        b = tensor(6 if weight[0] == 6 or "trans" in kind else weight[0], dtype=dtype).requires_grad_(mask[2])
        assert_same(function, x, w, b)
        if mask[0] or mask[1]:
            assert_same(lambda x, w: function(x, w, None), x, w)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("affine", ["", "weight", "bias", "weight bias"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_batch_norm(dtype: torch.dtype, affine: str, last: bool, training: bool) -> None:
    if affine == "bias" and DEVICE != "cpu":
        pytest.skip("eager's own backward fails: tensor does not have a device")
    mean, var = torch.randn(4).to(dtype), torch.rand(4).to(dtype)
    weight = torch.randn(4).to(dtype) if "weight" in affine else None

    def norm(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.batch_norm(x, mean.clone(), var.clone(), weight, bias, training)

    for shape in ((2, 4, 9, 7), (5, 4), (3, 4, 6)):
        x = tensor(*shape, dtype=dtype, last=last).requires_grad_()
        if "bias" not in affine:
            assert_same(norm, x)
            continue
        for mask in ((True, False), (True, True), (False, True)):
            assert_same(norm, x.detach().requires_grad_(mask[0]), torch.randn(4).to(dtype).requires_grad_(mask[1]))


def test_the_comparison_sees_a_difference() -> None:
    x = torch.randn(9, requires_grad=True)
    found, expected = run(F.relu, [x], lean=True)[1], run(F.gelu, [x], lean=False)[1]
    with pytest.raises(AssertionError):
        assert_bitwise(found, expected)
