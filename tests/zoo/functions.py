"""Custom ``autograd.Function``s and custom ops."""

from __future__ import annotations

from typing import Any

import torch
from tests.cases import Case, case
from tests.zoo.dense import mean_square
from torch import Tensor, nn


class PoliteLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            grad @ weight if needs_x else None,
            grad.T @ x if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )


class RudeLinear(torch.autograd.Function):
    """Ignores ``needs_input_grad``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.addmm(bias, x, weight.T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x, grad.sum(0)


class HiddenSave(torch.autograd.Function):
    """Keeps a tensor as an attribute, where no saved-tensor hook sees it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.x, ctx.weight = x, weight
        ctx.squared = x.square()
        return x @ weight.T + ctx.squared.sum(1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_weight = ctx.needs_input_grad
        grad_x = grad @ ctx.weight + 2 * ctx.x * grad.sum(1, keepdim=True) if needs_x else None
        return grad_x, grad.T @ ctx.x if needs_weight else None


class SharedWork(torch.autograd.Function):
    """Backward makes one matmul that both gradients read, and recomputes another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, a, b)
        return torch.relu(x @ a) @ b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b = ctx.saved_tensors
        hidden = x @ a
        grad_hidden = (grad @ b.T) * (hidden > 0)
        return (
            grad_hidden @ a.T if ctx.needs_input_grad[0] else None,
            x.T @ grad_hidden if ctx.needs_input_grad[1] else None,
            torch.relu(hidden).T @ grad if ctx.needs_input_grad[2] else None,
        )


polite_linear = PoliteLinear.apply  # a reference taken at import, as user code takes it


class FunctionLinear(nn.Module):
    def __init__(self, function: Any, width_in: int, width_out: int, *, bias: bool = True) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(width_out, width_in) / width_in**0.5)
        self.bias = nn.Parameter(torch.zeros(width_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight) if self.bias is None else self.function(x, self.weight, self.bias)


def function_case(function: Any, *, bias: bool = True) -> Case:
    model = nn.Sequential(
        nn.Linear(6, 8),
        nn.ReLU(),
        FunctionLinear(function, 8, 7, bias=bias),
        nn.Tanh(),
        FunctionLinear(function, 7, 5, bias=bias),
        nn.Linear(5, 2),
    )
    return Case(model, torch.randn(4, 6), mean_square)


@case()
def function_with_weights() -> Case:
    return function_case(PoliteLinear.apply)


@case()
def function_stored_at_import() -> Case:
    return function_case(polite_linear)


@case()
def function_ignores_needs_input_grad() -> Case:
    return function_case(RudeLinear.apply)


@case()
def function_keeps_attribute() -> Case:
    return function_case(HiddenSave.apply, bias=False)


class SharedWorkNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.head = nn.Linear(5, 6), nn.Linear(4, 2)
        self.a, self.b = nn.Parameter(torch.randn(6, 7) / 3), nn.Parameter(torch.randn(7, 4) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(SharedWork.apply(self.before(x), self.a, self.b))


@case()
def function_shared_work() -> Case:
    return Case(SharedWorkNet(), torch.randn(3, 5), mean_square)


class ReversibleFunction(torch.autograd.Function):
    """A RevNet block: backward rebuilds the inputs, reruns both halves and differentiates them there.

    The weights are not arguments: they live in the modules, and their gradients are accumulated inside backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, f: nn.Module, g: nn.Module) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        y = a + f(b)
        z = b + g(y)
        ctx.f, ctx.g = f, g
        out = torch.cat([y, z], dim=-1)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (out,) = ctx.saved_tensors
        y, z = out.detach().chunk(2, dim=-1)
        grad_y, grad_z = grad.chunk(2, dim=-1)
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            g_y = ctx.g(y)
            torch.autograd.backward(g_y, grad_z)
        b = z - g_y.detach()
        grad_y = grad_y + y.grad
        with torch.enable_grad():
            b = b.detach().requires_grad_()
            torch.autograd.backward(ctx.f(b), grad_y)
        return torch.cat([grad_y, grad_z + b.grad], dim=-1), None, None


class Reversible(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))
        self.g = nn.Sequential(nn.Linear(width, width), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return ReversibleFunction.apply(x, self.f, self.g)


@case()
def function_reversible() -> Case:
    model = nn.Sequential(nn.Linear(5, 8), Reversible(4), Reversible(4), nn.Linear(8, 2))
    return Case(model, torch.randn(3, 5), mean_square)


class LocalAutograd(torch.autograd.Function):
    """Backward reruns the layer under autograd and asks ``torch.autograd.grad`` for its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return torch.tanh(torch.nn.functional.linear(x, weight, bias))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [
            t.detach().requires_grad_(needs) for t, needs in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
        ]
        with torch.enable_grad():
            out = torch.tanh(torch.nn.functional.linear(*leaves))
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(out, wanted, grad))
        return tuple(next(found) if leaf.requires_grad else None for leaf in leaves)


@case()
def function_local_autograd() -> Case:
    return function_case(LocalAutograd.apply)


@torch.library.custom_op("frostline_zoo::scaled_linear", mutates_args=())
def scaled_linear(x: Tensor, weight: Tensor, scale: float) -> Tensor:
    return scale * (x @ weight.T)


@scaled_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _scaled_linear_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.scale = inputs
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight if ctx.needs_input_grad[0] else None)


def _scaled_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    return (
        ctx.scale * (grad @ weight) if ctx.needs_input_grad[0] else None,
        ctx.scale * (grad.T @ x) if ctx.needs_input_grad[1] else None,
        None,
    )


scaled_linear.register_autograd(_scaled_linear_backward, setup_context=_scaled_linear_save)


class CustomOpNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.head = nn.Linear(5, 6), nn.Linear(7, 2)
        self.weight = nn.Parameter(torch.randn(7, 6) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(scaled_linear(self.before(x), self.weight, 0.5)))


@case()
def custom_op() -> Case:
    return Case(CustomOpNet(), torch.randn(3, 5), mean_square)


class Rerun(torch.autograd.Function):
    """Runs a module again in its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        with torch.no_grad():
            return module(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.module(x)
        torch.autograd.backward(y, grad)
        return x.grad, None


class RunsAgain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.again = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Rerun.apply(self.before(x), self.again))


@case()
def function_runs_a_module_again() -> Case:
    """As reversible layers do; the dropout's mask is made like the activation, and is no gradient."""
    return Case(RunsAgain(), torch.randn(5, 4), mean_square)
