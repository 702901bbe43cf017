"""What a graph holds, in bytes: exactly what is stated, real and fake, and never more than eager's."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.kernels.comparing import kept_nbytes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from frostline.kernels import lean_kernels

NUMEL = 2 * 4 * 9 * 7
WEIGHT = torch.randn(4, 4, 3, 3)
MEAN, VAR = torch.zeros(4), torch.ones(4)

# op, bytes kept by eager, bytes kept by us; of 504 elements of which nobody else keeps anything
CASES: dict[str, tuple[Callable[[Tensor], Tensor], int, int]] = {
    "relu": (F.relu, 4 * NUMEL, 63),
    "relu_": (F.relu_, 4 * NUMEL, 63),
    "relu6": (F.relu6, 4 * NUMEL, 63),
    "relu6_": (lambda x: F.relu6(x, inplace=True), 4 * NUMEL, 63),
    "leaky_relu": (F.leaky_relu, 4 * NUMEL, 63),
    "leaky_relu_": (F.leaky_relu_, 4 * NUMEL, 63),
    "threshold": (lambda x: F.threshold(x, 0.5, 0), 4 * NUMEL, 63),
    "threshold_": (lambda x: F.threshold_(x, 0.5, 0), 4 * NUMEL, 63),
    "prelu": (lambda x: F.prelu(x, x.new_ones(4)), 4 * NUMEL + 16, 63 + 16),
    "dropout": (F.dropout, 4 * NUMEL, 63),
    "dropout_": (lambda x: F.dropout(x, inplace=True), 4 * NUMEL, 63),
    "native_dropout": (lambda x: torch.native_dropout(x, 0.5, True)[0], NUMEL, 63),
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), 4 * NUMEL + 8 * 96, 96),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2), 4 * NUMEL, 0),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, 2), 4 * NUMEL, 0),
    "conv2d": (lambda x: F.conv2d(x, x.new_ones(4, 4, 3, 3)), 4 * NUMEL + 576, 576),
    "batch_norm": (lambda x: F.batch_norm(x, x.new_ones(4), x.new_ones(4)), 4 * NUMEL + 32, 32),
}


def _kept(op: Callable[[Tensor], Tensor], *, lean: bool) -> int:
    x = torch.randn(2, 4, 9, 7, requires_grad=True)
    if not lean:
        return kept_nbytes(op(x.neg()))
    with lean_kernels() as run:
        result = op(x.neg())
    assert not run.fallbacks
    edge = torch.autograd.graph.get_gradient_edge(result)
    del result
    return kept_nbytes(_Of(edge.node))


class _Of:
    def __init__(self, node: object) -> None:
        self.grad_fn = node


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize("name", CASES)
def test_kept(name: str, fake: bool) -> None:
    op, eager, lean = CASES[name]
    if fake:
        with FakeTensorMode():
            assert _kept(op, lean=True) == lean
    else:
        assert _kept(op, lean=False) == eager
        assert _kept(op, lean=True) == lean


@pytest.mark.parametrize("trained", ["input", "weight", "bias", "weight bias", "input bias"])
def test_a_convolution_keeps_what_its_mask_reads(trained: str) -> None:
    x, w, b = torch.randn(2, 4, 9, 7), torch.randn(6, 4, 3, 3), torch.randn(6)
    for name, t in (("input", x), ("weight", w), ("bias", b)):
        t.requires_grad_(name in trained)
    with lean_kernels():
        found = kept_nbytes(F.conv2d(x, w, b))
    assert found == (x.nbytes if "weight" in trained else 0) + (w.nbytes if "input" in trained else 0)


def test_what_the_next_op_keeps_is_free() -> None:
    """conv -> relu -> conv, all trained: eager keeps the ReLU's result once, and so do we."""
    first, second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
    x = torch.randn(2, 3, 8, 8)

    def forward() -> Tensor:
        return second(F.relu(first(x)))

    own = (x, *first.parameters(), *second.parameters())
    eager = kept_nbytes(forward(), own)
    with lean_kernels() as run:
        result = forward()
        (holder,) = run.holders()
        assert holder.packed is None
        assert kept_nbytes(result, own) == eager == 2 * 4 * 6 * 6 * 4
        del result, holder
        second.requires_grad_(False)
        result = forward()
        (holder,) = run.holders()
        assert holder.packed is not None
        assert holder.kept is None
        assert holder.packed.nbytes == holder.packed_nbytes == kept_nbytes(result, own) == 36


def test_a_holder_says_which_storage_it_held() -> None:
    with FakeTensorMode(), lean_kernels() as run:
        x = torch.randn(2, 8, requires_grad=True).neg()
        result = F.relu(x)
        key = result.untyped_storage()._cdata
        node = result.grad_fn
        del result
        (holder,) = run.holders()
        assert (holder.storage_key, holder.packed_nbytes) == (key, 2)
        assert holder.packed is not None
        del node, holder
        assert not run.holders()


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.LeakyReLU()], ids=str)
@pytest.mark.parametrize("trained", ["", "0", "2", "4", "8", "weight", "bias", "1."])
@pytest.mark.parametrize("training", [False, True])
def test_never_more_than_eager(activation: nn.Module, trained: str, training: bool) -> None:
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), activation, nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3), activation, nn.Dropout(0.2), nn.Flatten(), nn.Linear(8 * 5 * 5, 8), activation),
    )
    net.train(training)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(trained in name)
    x = torch.randn(2, 3, 16, 16)
    own = (x, *net.parameters(), *net.buffers())
    eager = kept_nbytes(net(x).sum(), own)
    with lean_kernels():
        found = kept_nbytes(net(x).sum(), own)
    assert found <= eager
    if trained == "0":
        assert found < eager / 2 or training


@pytest.mark.parametrize("affine", [False, True])
def test_a_batch_norm_of_which_only_the_shift_trains_keeps_no_input(affine: bool) -> None:
    x, shift = torch.randn(2, 4, 9, 7), torch.zeros(4, requires_grad=True)
    scale = torch.ones(4) if affine else None
    with lean_kernels() as run:
        result = F.batch_norm(x, None, None, scale, shift, training=True)
    assert not run.fallbacks
    edge = torch.autograd.graph.get_gradient_edge(result)
    del result
    assert kept_nbytes(_Of(edge.node)) == 4 * (4 + 4 + 4 * affine)  # statistics of the batch, and the scale


def test_a_process_ends_well_in_the_middle_of_a_run() -> None:
    """Neither a run nor the graphs made in it are closed: at the end of Python torch is half gone."""
    script = """
        import torch, frostline
        from torch import nn
        model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
        run = frostline.train_only(model, "0")
        first, second = model(torch.randn(2, 3, 8, 8)), model[1](model[0](torch.randn(2, 3, 8, 8)))
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_however_many_wait_for_something_else_to_let_go_of_them() -> None:
    """Forty results, each flattened: a view dies after what it is of, and nothing of ours runs afterwards."""
    layer, x = nn.Conv2d(3, 4, 1), torch.randn(2, 3, 4, 4)
    with lean_kernels():
        result = torch.stack([F.relu(layer(x)).flatten(1) for _ in range(40)]).sum()
        gc.collect()
        assert kept_nbytes(result, (x, *layer.parameters())) == 40 * 2 * 4 * 4 * 4 // 8
