"""The scheme of memsave_torch, written anew for comparison: modules are swapped for ones whose Function saves less.

A frozen convolution's input, an eval batch norm's and a pool's are not saved; of a ReLU and a dropout a bool is, of a
pool its indices. What is called as a function, or is another module, stays torch's. Each name of
`benchmarks.models` is a TARGET here: ``benchmarks/memsave.py:resnet50``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import models
from benchmarks.models import Made

aten: Any = torch.ops.aten


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
        ctx.how, ctx.shape, ctx.bias = how, x.shape, None if bias is None else list(bias.shape)
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        result: Tensor = torch.convolution(x, weight, bias, *how)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        given = grad.new_empty(1).expand(ctx.shape) if x is None else x
        found = aten.convolution_backward(grad, given, weight, ctx.bias, *ctx.how, list(ctx.needs_input_grad[:3]))
        return (*found, *(None for _ in ctx.how))


class Conv2d(nn.Conv2d):
    """Its input is saved only if its weight trains."""

    def forward(self, x: Tensor) -> Tensor:
        how = (self.stride, self.padding, self.dilation, False, (0, 0), self.groups)
        result: Tensor = _Conv.apply(x, self.weight, self.bias, *how)  # type: ignore[no-untyped-call]
        return result


class _EvalNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
        ctx.eps = eps
        ctx.save_for_backward(x if weight.requires_grad else None, weight, mean, var)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, mean, var = ctx.saved_tensors
        empty = grad.new_empty(0)
        mask = list(ctx.needs_input_grad[:3])
        given = grad if x is None else x
        found = aten.native_batch_norm_backward(grad, given, weight, mean, var, empty, empty, False, ctx.eps, mask)
        return (*found, None, None, None)


class BatchNorm2d(nn.BatchNorm2d):
    """In eval mode its input is saved only if its weight trains."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)
        given = (self.weight, self.bias, self.running_mean, self.running_var, self.eps)
        result: Tensor = _EvalNorm.apply(x, *given)  # type: ignore[no-untyped-call]
        return result


class _ReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x > 0)
        return x.relu()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]


class ReLU(nn.ReLU):
    """A bool for each element is saved."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _ReLU.apply(x)  # type: ignore[no-untyped-call]
        return result


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *how: Any) -> Tensor:
        result, indices = F.max_pool2d_with_indices(x, *how)
        ctx.shape, ctx.how = x.shape, how
        ctx.save_for_backward(indices)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        kernel, stride, padding, dilation, ceil_mode = ctx.how
        pairs = [[n, n] if isinstance(n, int) else n for n in (kernel, stride, padding, dilation)]
        like = grad.new_empty(1).expand(ctx.shape)
        found = aten.max_pool2d_with_indices_backward(grad, like, *pairs, ceil_mode, ctx.saved_tensors[0])
        return (found, None, None, None, None, None)


class MaxPool2d(nn.MaxPool2d):
    """Its indices are saved."""

    def forward(self, x: Tensor) -> Tensor:
        how = (self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
        result: Tensor = _MaxPool.apply(x, *how)  # type: ignore[no-untyped-call]
        return result


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        kept = torch.rand_like(x) > p
        ctx.p = p
        ctx.save_for_backward(kept)
        return x * kept / (1 - p)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * ctx.saved_tensors[0] / (1 - ctx.p), None


class Dropout(nn.Dropout):
    """A bool for each element is saved."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        result: Tensor = _Dropout.apply(x, self.p)  # type: ignore[no-untyped-call]
        return result


SWAPPED = (Conv2d, BatchNorm2d, ReLU, MaxPool2d, Dropout)


def swap(model: nn.Module) -> nn.Module:
    """Every module of a kind that the scheme covers becomes one of its own, with the same parameters."""
    kinds = {kind.__mro__[1]: kind for kind in SWAPPED}
    for module in model.modules():
        kind = kinds.get(type(module))
        if kind is not None and not isinstance(getattr(module, "padding", 0), str):
            module.__class__ = kind
    return model


def _swapped(name: str) -> Made:
    model, inputs, loss = getattr(models, name)()
    return swap(model), inputs, loss


def __getattr__(name: str) -> Any:
    if not name.startswith("_") and name in vars(models):
        return functools.partial(_swapped, name)
    raise AttributeError(name)
