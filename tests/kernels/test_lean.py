"""Where lean kernels are on, where they are not, and that all of autograd's other promises hold under them."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from frostline.kernels import Holder, fallbacks, kernels_active, lean_kernels
from frostline.kernels.lean import _are_plain

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # (torch.func uses it as well)

W = torch.randn(4, 4, 3, 3, dtype=torch.float64)
OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "conv2d": lambda x: F.conv2d(x, W.to(x.dtype), padding=1),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x, W.to(x.dtype), padding=1),
    "batch_norm": lambda x: F.batch_norm(x, x.new_zeros(4), x.new_full((4,), 2.0), x.new_full((4,), 3.0)),
    "relu": F.relu,
    "relu_": lambda x: F.relu_(x * 1),
    "relu6": F.relu6,
    "relu6_": lambda x: F.relu6(x * 1, inplace=True),
    "leaky_relu": F.leaky_relu,
    "leaky_relu_": lambda x: F.leaky_relu_(x * 1),
    "threshold": lambda x: F.threshold(x, 0.1, 0.1),
    "threshold_": lambda x: F.threshold_(x * 1, 0.1, 0.1),
    "prelu": lambda x: F.prelu(x, x.new_full((4,), 0.2)),
    "dropout": lambda x: _seeded(torch.dropout, x),
    "dropout_": lambda x: _seeded(torch.dropout_, x * 1),
    "native_dropout": lambda x: _seeded(torch.native_dropout, x)[0],
    "max_pool2d": lambda x: F.max_pool2d(x, 2),
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 2),
}


def _seeded(function: Any, x: Tensor) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return function(x, 0.5, True)


def _input(dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 4, 6, 5, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dies", [False, True])
def test_gradcheck(op: str, dies: bool) -> None:
    """Of an input that lives on, and of one that is gone at backward, so that its bits stand for it."""
    x = torch.randn(1, 4, 4, 4, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor) -> Tensor:
        return OPS[op](x * 1 if dies else x)

    with lean_kernels() as run:
        assert torch.autograd.gradcheck(function, (x,), check_forward_ad=False)
        assert torch.autograd.gradgradcheck(function, (x,))
    assert not run.fallbacks


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("square", [False, True])
def test_second_derivatives(op: str, square: bool) -> None:
    """Zeros where eager has zeros, nothing where eager has nothing."""

    def second() -> list[Tensor | None]:
        x = _input()
        result = OPS[op](x)
        (first,) = torch.autograd.grad((result**2 if square else result).sum(), x, create_graph=True)
        if not first.requires_grad:
            return [first, None]
        return [first, *torch.autograd.grad((first**2).sum(), x, allow_unused=True)]

    expected = second()
    with lean_kernels():
        found = second()
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("op", OPS)
def test_a_second_backward(op: str) -> None:
    with lean_kernels():
        x = _input()
        result = OPS[op](x)
        gradient = torch.randn_like(result)
        (first,) = torch.autograd.grad(result, x, gradient, retain_graph=True)
        (again,) = torch.autograd.grad(result, x, gradient)
        assert torch.equal(first, again)
        with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
            torch.autograd.grad(result, x, gradient)


@pytest.mark.parametrize("op", OPS)
def test_modes_see_the_ops_that_they_saw_before(op: str) -> None:
    class Names(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func not in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):  # autograd's own, for saving
                self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    x = _input()
    with Names() as before:
        OPS[op](x)
    with lean_kernels(), Names() as found:
        result = OPS[op](x)
        del result
    assert found.names == before.names


@pytest.mark.parametrize("op", ["relu", "relu_", "leaky_relu_", "conv2d"])
def test_writing_to_what_is_needed_raises(op: str) -> None:
    def misuse() -> None:
        x = _input() * 1
        result = OPS[op](x)
        kept = result
        if op == "conv2d":
            kept = W
            weight = W.clone()
            result, kept = F.conv2d(x, weight), weight
        with torch.no_grad():
            kept.mul_(2)
        result.sum().backward()

    sentence = r"needed for gradient computation has been modified by an inplace operation: \[torch.DoubleTensor"
    with pytest.raises(RuntimeError, match=sentence):
        misuse()
    with lean_kernels(), pytest.raises(RuntimeError, match=sentence):
        misuse()


def test_writing_to_what_is_not_needed_does_not_raise() -> None:
    x = _input() * 1
    with lean_kernels():
        result = F.conv2d(x, W)
        with torch.no_grad():
            x.mul_(2)
        result.sum().backward()


@pytest.mark.parametrize("function", [F.relu_, F.hardtanh_, lambda x: F.dropout(x, inplace=True)])
def test_a_leaf_is_refused_and_a_view_is_written_through(function: Any) -> None:
    def through_view() -> tuple[Tensor, Tensor]:
        x = _input()
        base = x * 1
        torch.manual_seed(0)
        function(base[0])
        (gradient,) = torch.autograd.grad(base.square().sum(), x)
        return base.detach(), gradient

    expected = through_view()
    with lean_kernels():
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            function(_input())
        for found, before in zip(through_view(), expected, strict=True):
            assert torch.equal(found, before)


def test_backward_of_some_inputs_only() -> None:
    x, bias = _input(), torch.randn(4, dtype=torch.float64, requires_grad=True)
    with lean_kernels():
        F.conv2d(x, W, bias).sum().backward(inputs=[bias])
        assert x.grad is None
        (gradient,) = torch.autograd.grad(F.conv2d(x, W, bias).sum(), [bias])
        assert torch.equal(gradient, bias.grad)


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.3)),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU6(inplace=True), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, 2)),
    )
    net[1].eval()
    for parameter in net[1:].parameters():
        parameter.requires_grad_(False)
    return net


def _gradients(forward: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
    net, x = _net(), _input(torch.float32)
    torch.manual_seed(1)
    forward(net, x).float().square().sum().backward()
    return [x.grad, *(p.grad for p in net.parameters() if p.grad is not None)]


def _assert_same(forward: Callable[[nn.Module, Tensor], Tensor]) -> dict[str, Any]:
    expected = _gradients(forward)
    with lean_kernels() as run:
        found = _gradients(forward)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    return run.fallbacks


def _with_hooks(net: nn.Module, x: Tensor) -> Tensor:
    with saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        return net(x)


def _with_autocast(net: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return net(x)


def test_a_network() -> None:
    assert not _assert_same(lambda net, x: net(x))


def test_autocast() -> None:
    assert not _assert_same(_with_autocast)


def test_saved_tensor_hooks_see_what_is_kept() -> None:
    found = _assert_same(_with_hooks)
    assert set(found) == {"relu", "hardtanh_", "dropout", "max_pool2d_with_indices"}


def test_writes_to_views_are_left_to_torch() -> None:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return F.dropout(F.hardtanh(net(x)[:, :1], inplace=True), 0.3, inplace=True)

    found = _assert_same(forward)
    assert set(found) == {"hardtanh_", "dropout_"}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool) -> None:
    _assert_same(lambda net, x: checkpoint(net, x, use_reentrant=reentrant))
    _assert_same(lambda net, x: net[5:](checkpoint(net[:5], x, use_reentrant=reentrant)))


def test_torch_func() -> None:
    net, x = _net(), _input(torch.float32).detach()
    net[4].eval()
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(net, (parameters, dict(net.named_buffers())), (x,)).square().sum()

    def all_of_them() -> list[Tensor]:
        per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x[:, None])
        _, tangent = torch.func.jvp(lambda x: loss(parameters, x), (x,), (torch.ones_like(x),))
        return [*torch.func.grad(loss)(parameters, x).values(), *per_sample.values(), tangent]

    expected = all_of_them()
    with lean_kernels():
        found = all_of_them()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_vmap_of_a_backward() -> None:
    def jacobian() -> Tensor:
        x = _input()
        result = F.relu(F.conv2d(x, W)).sum((2, 3)).flatten()
        eye = torch.eye(len(result), dtype=x.dtype)
        return torch.autograd.grad(result, x, eye, is_grads_batched=True)[0]

    expected = jacobian()
    with lean_kernels():
        assert torch.allclose(jacobian(), expected, atol=1e-14)


def test_forward_mode() -> None:
    x = _input()
    with lean_kernels(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        assert torch.autograd.forward_ad.unpack_dual(F.relu(dual)).tangent is not None
        assert "forward-mode" in str(fallbacks()["relu"])


def test_scripted_and_traced() -> None:
    _assert_same(lambda net, x: torch.jit.script(net)(x))
    net = _net()
    net[4].eval()
    with lean_kernels():
        traced = torch.jit.trace(net, _input(torch.float32))
    assert "relu" in str(traced.inlined_graph)


def test_compiled() -> None:
    _assert_same(lambda net, x: torch.compile(net, backend="eager")(x))
    _assert_same(lambda net, x: torch.compile(net, backend="aot_eager")(x))


def test_other_threads_run_torchs_own_kernels() -> None:
    names = []

    def look() -> None:
        names.append(F.relu(_input()).grad_fn.name())
        names.append(kernels_active())

    with lean_kernels():
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        assert F.relu(_input()).grad_fn.name() != "ReluBackward0"
    assert names == ["ReluBackward0", False]


def test_the_dispatchers_keys_tell_plain_tensors_from_others() -> None:
    def keys(tensor: Tensor) -> torch._C.DispatchKeySet:
        return torch._C._dispatch_keys(tensor).remove(torch._C.DispatchKey.AutocastCPU)  # (it comes before autograd)

    x = _input()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    assert all(_are_plain(keys(each)) for each in (x, x.double(), nn.Parameter(x.detach())))
    others = (torch._neg_view(x), x.detach().to_sparse(), fake, x.to("meta"))
    assert not any(_are_plain(keys(each)) for each in others)
    assert not _are_plain(keys(x) | torch._C.DispatchKeySet(torch._C.DispatchKey.Python))  # as where a mode is on


_UNDONE = """
import torch
from frostline.kernels import kernels_active, lean_kernels
from frostline.kernels.lean import _rules

def tables():
    return [torch._C._dispatch_dump(f"aten::{name}") for name in _rules]

before = tables()
try:
    with lean_kernels(), lean_kernels():
        assert all(a != b for a, b in zip(tables(), before))
        1 / 0
except ZeroDivisionError:
    pass
assert tables() == before
"""


def test_an_open_run_is_held_by_torch_and_let_go_of_again() -> None:
    """Torch 2.11 does not hold what it stashes, and lets go of it all the same."""
    run = lean_kernels()
    before = sys.getrefcount(run)
    run.__enter__()
    assert sys.getrefcount(run) == before + 1
    run.close()
    assert sys.getrefcount(run) == before


def test_undone() -> None:
    """In a process of its own: while other threads run, the kernels stay in and do nothing."""
    subprocess.run([sys.executable, "-c", _UNDONE], check=True)


def test_runs_may_end_in_any_order() -> None:
    outer = lean_kernels().__enter__()
    inner = lean_kernels().__enter__()
    outer.close()
    assert kernels_active()
    inner.close()
    assert not kernels_active()


def test_torchs_own_kernel_where_nothing_is_saved() -> None:
    with lean_kernels():
        x, conv = _input(torch.float32), nn.Conv2d(4, 4, 3)
        assert conv(x).grad_fn.name() == "ConvolutionBackward0"
        with torch.no_grad():
            assert conv(x).grad_fn is None
        assert F.relu(x.detach()).grad_fn is None
        assert not fallbacks()


def test_threads_are_not_disturbed_by_runs_that_begin_and_end() -> None:
    stop, failures, rounds = threading.Event(), [], []
    conv, x = nn.Conv2d(3, 3, 3), torch.randn(1, 3, 8, 8, requires_grad=True)

    def work() -> None:
        try:
            while not stop.is_set():
                F.relu(conv(x)).sum().backward()
                rounds.append(1)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(2000):
        with lean_kernels():
            pass
    stop.set()
    thread.join()
    assert not failures
    assert rounds


def test_a_compiler_goes_through_kernels_that_had_to_stay() -> None:
    """Beside another thread the kernels are not taken away."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        with lean_kernels():
            pass
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        compiled = torch.compile(model, backend="aot_eager")
        x = torch.randn(2, 3, 6, 5)
        assert torch.equal(compiled(x), model(x))
        compiled(x).sum().backward()
        assert model[0].weight.grad is not None
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("how", ["negative", "zero", "batched"])
def test_gradients_that_are_more_than_their_memory(how: str) -> None:
    """Lazily negative, zeros without memory, several at once: the loops would not see it."""

    def found() -> Tensor:
        x = torch.linspace(-1, 1, 16, requires_grad=True)
        y = F.relu(x * 1) * 1  # (nobody else keeps the ReLU's result)
        gradient = torch.linspace(1, 2, 16)
        if how == "batched":
            return torch.autograd.grad(y, x, torch.stack([gradient, -gradient]), is_grads_batched=True)[0]
        given = torch._neg_view(gradient) if how == "negative" else torch._efficientzerotensor((16,))

        class Gives(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, y: Tensor) -> Tensor:
                return y.sum()

            @staticmethod
            def backward(ctx: Any, _gradient: Tensor) -> Tensor:
                return given

        return torch.autograd.grad(Gives.apply(F.relu(x * 1)), x)[0]

    expected = found()
    with lean_kernels():
        assert torch.equal(found(), expected)


class Image(Tensor):
    """As those of torchvision's transforms: another name, and torch's own kernels."""


class Weight(nn.Parameter):
    pass


@pytest.mark.parametrize("what", ["input", "weight"])
def test_a_subclass_without_ops_of_its_own_is_a_tensor(what: str) -> None:
    layer, x = nn.Conv2d(4, 4, 1), torch.randn(2, 4, 3, 3)
    if what == "weight":
        layer.weight = Weight(layer.weight.detach())
    with lean_kernels() as run:
        F.relu(layer(x.as_subclass(Image) if what == "input" else x)).sum().backward()
    assert run.num_replaced == 2
    assert not run.fallbacks


def _quantised(tensor: Tensor) -> Any:
    if not tensor.is_floating_point():
        return tensor
    scale = tensor.abs().max() / 127
    return scale, (tensor / scale).round().to(torch.int8)


def _wider(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


HOOKS = {
    "wider": (_wider, lambda packed: packed.float() if packed.is_floating_point() else packed),
    "quantised": (_quantised, lambda packed: packed if isinstance(packed, Tensor) else packed[0] * packed[1]),
}


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("op", ["relu", "dropout", "dropout_", "native_dropout", "max_pool2d", "prelu"])
def test_saved_tensor_hooks_that_convert_see_what_eager_gives_them(op: str, hooks: str) -> None:
    def gradient() -> Tensor:
        x = _input(torch.float32)
        with saved_tensors_hooks(*HOOKS[hooks]):
            OPS[op](x * 1).square().sum().backward()
        assert x.grad is not None
        return x.grad

    expected = gradient()
    with lean_kernels():
        assert torch.equal(gradient(), expected)


@pytest.mark.filterwarnings("ignore:.*functorch:UserWarning")
@pytest.mark.parametrize("op", ["relu", "relu6", "leaky_relu", "prelu", "dropout", "threshold", "max_pool2d"])
def test_forward_mode_through_a_backward(op: str) -> None:
    """The graph is made before; only the gradient that comes in has a tangent."""

    def tangent() -> Tensor:
        x = _input()
        result = OPS[op](x * 1) * 1
        ones = torch.ones_like(result)
        return torch.func.jvp(lambda given: torch.autograd.grad(result, x, given)[0], (ones,), (2 * ones,))[1]

    expected = tangent()
    with lean_kernels():
        assert torch.equal(tangent(), expected)


@pytest.mark.parametrize("op", ["relu", "relu6", "leaky_relu", "threshold"])
@pytest.mark.parametrize("keeps_graph", [False, True])
def test_a_collection_in_the_middle_of_a_backward(op: str, keeps_graph: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It packs what is in a cycle until then, between any two steps of the backward that is to read it."""
    take, unpacked = Holder.take, Holder.unpacked

    def between(*_: Any) -> None:
        gc.collect()

    monkeypatch.setattr(Holder, "take", lambda self: (between(), take(self), between())[1])
    monkeypatch.setattr(Holder, "unpacked", lambda self, packed: (between(), unpacked(self, packed))[1])

    def gradient() -> Tensor:
        x = _input()
        before = x * 1
        result = OPS[op](before)
        edge, cycle = torch.autograd.graph.get_gradient_edge(result), [before, result]
        cycle.append(cycle)  # type: ignore[arg-type]
        given = torch.ones_like(result)
        del before, result, cycle
        return torch.autograd.grad(edge, x, given, create_graph=keeps_graph)[0].detach()

    expected = gradient()
    with lean_kernels():
        assert torch.equal(gradient(), expected)


@pytest.mark.parametrize("p", [-1.0, 1.5])
def test_a_wrong_share_is_refused_as_by_torch(p: float) -> None:
    with pytest.raises(RuntimeError) as eager:
        torch.dropout(_input(), p, True)
    with lean_kernels(), pytest.raises(RuntimeError) as ours:
        torch.dropout(_input(), p, True)
    assert str(ours.value) == str(eager.value)
