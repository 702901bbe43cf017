"""What the Functions here have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .unseen import aside

_is_grad_enabled, _set_grad_enabled = torch.is_grad_enabled, torch._C._set_grad_enabled
_BelowAutograd = torch._C._AutoDispatchBelowAutograd


class Kernel(torch.autograd.Function):
    """An op run below autograd, by the same kernel as ever, with a backward that keeps less.

    Where eager's second derivative is zeros and ours would be nothing at all, a Function returns an *anchor* beside its
    results: an empty tensor, saved, that ties what backward uses to this node again (see `tied`).
    """

    run: ClassVar[Callable[..., Any]]
    """``apply``, unseen by whoever watches the user's own Functions."""

    def __init_subclass__(cls) -> None:
        cls.run = super(torch.autograd.Function, cls).apply  # type: ignore[misc]


class below_autograd:  # noqa: N801
    """As eager's own autograd kernels run an op: below autograd, and in grad mode, which some look at."""

    __slots__ = ("_grad_mode", "_guard")

    def __enter__(self) -> None:
        self._grad_mode = _is_grad_enabled()
        _set_grad_enabled(True)
        self._guard = _BelowAutograd()
        self._guard.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self._guard.__exit__(*exc)
        _set_grad_enabled(self._grad_mode)


def anchor(dtype: torch.dtype) -> Tensor:
    """A new one. To be made `aside`."""
    return torch.empty(0, dtype=dtype)


class _Tied(Kernel):
    @staticmethod
    def forward(ctx: Any, stand_in: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(anchor)
        with aside(stand_in):
            return stand_in.detach()

    @staticmethod
    def backward(ctx: Any, _gradient: Tensor) -> tuple[None, Tensor]:
        return None, torch.zeros_like(*ctx.saved_tensors)


def tied(stand_in: Tensor, anchor: Tensor) -> Tensor:
    """``stand_in`` as a result of the node that ``anchor`` is of, if a graph is being made of backward."""
    return _Tied.run(stand_in, anchor) if torch.is_grad_enabled() else stand_in


def wanted(ctx: Any) -> list[bool]:
    """Of which inputs this backward is to compute the gradient: ``backward(inputs=...)`` may not ask for all."""
    asked = list(ctx.needs_input_grad)
    if sum(asked) > 1:
        nodes = [node for node, _ in ctx.next_functions if node is not None]
        for position, node in zip([i for i, needed in enumerate(asked) if needed], nodes, strict=True):
            asked[position] = _will_run(node)
    return asked


def _will_run(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf whose gradient torch.autograd.grad is to return
        return True


def is_replaced(node: Any) -> bool:
    """Whether a node of autograd's graph is one of ours."""
    forward = getattr(node, "_forward_cls", None)
    return forward is not None and issubclass(forward, Kernel)
