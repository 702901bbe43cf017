"""Activations whose derivative has two values: of each element one bit is read.

The bits say where a kept tensor lets the gradient through. Backward is eager's own op on what was kept, or on ones and
zeros made from the bits; or, where that comes to the same and is quicker, the bits laid over the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from .bits import NoBitsError, above, between, let_through, not_up_to, pack_bits, unpack_bits
from .function import Kernel, anchor, below_autograd, tied
from .holding import Holder
from .lean import LeanKernels, NotCoveredError, Op, check_no_hooks, replaces
from .unread import Looks, lies_alike
from .unseen import aside, transforming, unseen

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Gate:
    """How one activation is undone.

    Attributes:
        keeps: what eager keeps: the ``"result"``, the ``"input"``, or a ``"copy"`` of an input that is written to.
        bits: of that, a bit for each element: whether the gradient goes through; None if a bit cannot say it.
        backward: eager's op, whose arguments after the gradient and the kept tensor are ...
        args: ... those for what eager keeps, and ...
        args_for_bits: ... those for a tensor of ones and ``other``.
        lets_through: the gradient comes through as it is, or not at all.
        other: what stands for an element where it does not.
    """

    keeps: str
    bits: Callable[[Tensor], Tensor | None]
    backward: Any
    args: tuple[Any, ...]
    args_for_bits: tuple[Any, ...]
    lets_through: bool = True
    other: float = 0.0


class Gated(Kernel):
    @staticmethod
    def forward(
        ctx: Any, op: Op, gate: Gate, holder: Holder, looks: Looks, input: Tensor, *how: Any
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.gate, ctx.holder, ctx.looks = gate, holder, looks
        with below_autograd():
            bits, kept = None, input
            if gate.keeps == "copy":
                with aside(input):
                    bits = gate.bits(input)
                kept = input.clone() if bits is None else input
            result = op.call(input, *how)
        with aside(input):
            if bits is not None:
                holder.hold_packed(bits)
            else:
                holder.hold(result if gate.keeps == "result" else kept)
            tie = anchor(input.dtype)
        if result is input:
            ctx.mark_dirty(input)
        ctx.save_for_backward(tie, *[weight for weight in how if isinstance(weight, Tensor)])
        return result, tie

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, of_anchor: Tensor | None) -> Any:
        tie, *weights = ctx.saved_tensors
        nothing = (None,) * (len(ctx.needs_input_grad) - 5)
        if gradient is None and of_anchor is None:
            return (None, None, None, None, None, *nothing)
        gate: Gate = ctx.gate
        holder: Holder = ctx.holder
        kept, was_packed = holder.take()
        if gradient is not None and was_packed and gate.lets_through and lies_alike(gradient, ctx.looks):
            return (None, None, None, None, let_through(gradient, kept), *nothing)
        args = (*weights, *(gate.args_for_bits if was_packed else gate.args))
        if was_packed:
            kept = holder.unpacked(kept)
        if gradient is None:
            gradient = torch.zeros_like(kept)
        found = _backward(gate.backward, gradient, tied(kept, tie), args, spent=was_packed)
        return (None, None, None, None, found, *nothing)


def _backward(op: Any, gradient: Tensor, kept: Tensor, args: Sequence[Any], *, spent: bool) -> Tensor:
    """Run eager's op; its result may take the place of ``kept`` where that is ``spent``."""
    alike = gradient.dtype == kept.dtype and gradient.stride() == kept.stride()
    derived = torch.is_grad_enabled() or transforming()
    if spent and alike and not derived and "grad_input" in op.overloads():
        return op.grad_input(gradient, kept, *args, grad_input=kept)  # type: ignore[no-any-return]
    found = op(gradient, kept, *args)
    return found if isinstance(found, Tensor) else found[0]


def _run(run: LeanKernels, op: Op, gate: Gate, input: Tensor, *how: Any) -> Any:
    if op.is_in_place and (input._is_view() or input.is_leaf):
        raise NotCoveredError("written in place to a view or a leaf")
    check_no_hooks()
    looks = Looks.of(input)
    if not looks.is_dense:
        raise NotCoveredError("its elements lie apart or in one place")

    def stand_in(bits: Tensor) -> Tensor:
        ones = unpack_bits(bits, looks.shape, looks.stride, looks.dtype)
        return ones.mul_(1 - gate.other).add_(gate.other) if gate.other else ones

    holder = Holder(gate.bits, stand_in, _node(op.name), run)
    result, _anchor = Gated.run(op, gate, holder, looks, input, *how)
    if gate.keeps != "copy":
        holder.watch(result if gate.keeps == "result" else input)
    return result


@cache
def _node(op: str) -> str:
    return f"is output 0 of {op.title()}Backward0"


def _above(threshold: float) -> Callable[[Tensor], Tensor]:
    """NaN is above everything: so say these ops' backwards."""
    condition = not_up_to(threshold)

    def bits(kept: Tensor) -> Tensor:
        if kept.is_cpu:
            return pack_bits(kept, condition)
        return pack_bits(kept, not_up_to(_rounded(threshold, kept.dtype)))

    return bits


@lru_cache(maxsize=64)
def _rounded(number: float, dtype: torch.dtype) -> float:
    """As accelerators compare with it: in the tensor's own dtype."""
    with unseen():
        return float(torch.tensor(number, dtype=dtype, device="cpu"))


def _between(low: float, high: float) -> Callable[[Tensor], Tensor | None]:
    """Of NaN, hardtanh's backward says one thing in its vectorised loop and the other outside; on accelerators, which
    have one loop, that it lets gradients through.
    """
    condition = between(low, high)

    def not_outside(value: Tensor) -> Tensor:
        return (value <= low).logical_or_(value >= high).logical_not_()

    def bits(kept: Tensor) -> Tensor | None:
        try:
            return pack_bits(kept, condition if kept.is_cpu else not_outside)
        except NoBitsError:
            return None

    return bits


def _positive(kept: Tensor) -> Tensor:
    return pack_bits(kept, _POSITIVE)


_POSITIVE = above(0.0)


@cache
def _relu() -> Gate:
    return Gate("result", _above(0), _aten.threshold_backward, (0,), (0,))


@replaces("relu", "relu_")
def relu(run: LeanKernels, op: Op, input: Tensor) -> Any:
    return _run(run, op, _relu(), input)


@lru_cache(maxsize=64)
def _threshold(keeps: str, threshold: float) -> Gate:
    return Gate(keeps, _above(threshold), _aten.threshold_backward, (threshold,), (0,))


@replaces("threshold", "threshold_")
def threshold(run: LeanKernels, op: Op, input: Tensor, threshold: float, value: float) -> Any:
    keeps = "copy" if op.is_in_place else "input"
    return _run(run, op, _threshold(keeps, threshold), input, threshold, value)


@lru_cache(maxsize=64)
def _hardtanh(keeps: str, low: float, high: float) -> Gate:
    return Gate(keeps, _between(low, high), _aten.hardtanh_backward, (low, high), (0, 2))


@replaces("hardtanh", "hardtanh_")
def hardtanh(run: LeanKernels, op: Op, input: Tensor, low: float, high: float) -> Any:
    keeps = "copy" if op.is_in_place else "input"
    return _run(run, op, _hardtanh(keeps, low, high), input, low, high)


@lru_cache(maxsize=64)
def _leaky_relu(slope: float, in_place: bool) -> Gate:
    keeps = "result" if in_place else "input"
    return Gate(keeps, _positive, _aten.leaky_relu_backward, (slope, in_place), (slope, False), lets_through=False)


@replaces("leaky_relu", "leaky_relu_")
def leaky_relu(run: LeanKernels, op: Op, input: Tensor, slope: float) -> Any:
    in_place = op.is_in_place
    if in_place and slope < 0:
        return NotImplemented  # its backward refuses this
    return _run(run, op, _leaky_relu(slope, in_place), input, slope)


# (Its first derivative counts 0 to the negative elements, the second to the positive ones: so 0 stands for neither.)
_PRELU = Gate("input", _positive, _aten._prelu_kernel_backward, (), (), lets_through=False, other=-1.0)


@replaces("_prelu_kernel")
def prelu(run: LeanKernels, op: Op, input: Tensor, weight: Tensor) -> Any:
    if weight.requires_grad:
        return NotImplemented
    return _run(run, op, _PRELU, input, weight)
