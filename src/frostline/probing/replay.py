"""Running one recorded call again, on stand-in tensors, under autograd.

`Stage` owns the fake mode the stand-ins live in and the model they may have to be lent to (a Function that closes over
a module). `perform` runs a call on given tensors; checkpointed regions are run by torch's own ``checkpoint`` over an
interpreter of the recorded ops, so recomputation and early stop are torch's, not ours.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from frostline.tracing.calls import Call, TensorMeta, fill

_STRIDED = torch.strided


def stand_in(meta: TensorMeta, *, real: bool = False) -> Tensor:
    """A tensor with the metadata of one in the trace, its values unset (zeros for integers, ones for the rest, if real).

    Call it under the fake mode for a tensor without memory.
    """
    if meta.layout is not _STRIDED:
        return torch.empty(meta.shape, dtype=meta.dtype, layout=meta.layout, device=meta.device)
    tensor = torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device=meta.device)
    if real and tensor.numel():
        tensor.copy_(torch.zeros((), dtype=meta.dtype) if not meta.dtype.is_floating_point else torch.ones(()))
    return tensor


class _Seed(torch.autograd.Function):
    """Makes a tensor need a gradient without copying it, viewing it, or making it a leaf (in-place ops refuse those)."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, tensor: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(tensor)
        ctx.token_meta = token.shape
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        if gradient is None:
            return None, None
        received = _received.get(id(ctx))
        if received is not None:
            received(gradient)
        return gradient.new_empty(()), None


_received: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


class Receiver:
    """Told the gradient that reaches one seeded input."""

    def __init__(self, sink: Callable[[Tensor], None]) -> None:
        self.sink = sink

    def __call__(self, gradient: Tensor) -> None:
        self.sink(gradient)


def seed(tensor: Tensor, sink: Callable[[Tensor], None]) -> tuple[Tensor, Tensor, Receiver]:
    """Make ``tensor`` need a gradient; returns it, the token to differentiate by, and the receiver to keep alive."""
    token = torch.empty((), requires_grad=True)
    seeded = _Seed.apply(token, tensor)
    receiver = Receiver(sink)
    _received[id(seeded.grad_fn)] = receiver
    return seeded, token, receiver


@contextmanager
def autocast(state: tuple[Any, ...]) -> Iterator[None]:
    """The autocast state a torch call was recorded under (ops below autograd were cast already: none)."""
    with ExitStack() as stack:
        if not state:
            stack.enter_context(torch.autocast("cpu", enabled=False))
        else:
            *devices, cache = state
            for device, enabled, dtype in devices:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache))
        yield


def perform(call: Call, tensors: Sequence[Tensor], on_recompute: Callable[[], Any] | None = None) -> Any:
    """Run ``call`` with ``tensors`` in place of its inputs (and captured tensors), under the present grad mode."""
    if call.kind == "op":
        return call.target(*fill(call.args, tensors), **fill(call.kwargs, tensors))
    with autocast(call.autocast):
        if call.kind == "torch":
            return call.target(*fill(call.args, tensors), **fill(call.kwargs, tensors))
        if call.kind == "function":
            return call.target.apply(*fill(call.args, tensors))
        return _perform_checkpoint(call, tensors, on_recompute)


def _perform_checkpoint(call: Call, tensors: Sequence[Tensor], on_recompute: Callable[[], Any] | None) -> Any:
    num_inputs = len(call.inputs)
    captured = {slot.value: tensor for slot, tensor in zip(call.captured, tensors[num_inputs:], strict=True)}
    region = call.recompute[0] if call.recompute else call
    wanted = [slot.value for slot in (region.outputs if call.recompute else call.outputs)]
    runs = 0

    def interpret_region(*given: Tensor) -> tuple[Tensor, ...]:
        nonlocal runs
        runs += 1
        values = dict(captured)
        values.update(zip((slot.value for slot in region.inputs), given, strict=True))
        with torch.autocast("cpu", enabled=False):
            if runs > 1 and on_recompute is not None:
                with on_recompute():
                    interpret(region.children, values)
            else:
                interpret(region.children, values)
        return tuple(values[value] for value in wanted)

    if call.recompute:
        return checkpoint(interpret_region, *tensors[:num_inputs], use_reentrant=True, preserve_rng_state=False)
    options = call.options
    return checkpoint(
        interpret_region,
        *tensors[:num_inputs],
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=options["context_fn"],
        early_stop=options["early_stop"],
    )


def interpret(calls: Sequence[Call], values: dict[int, Any]) -> None:
    """Run recorded calls in order; ``values`` maps a trace's tensors to the ones to use, and receives the results."""
    for call in calls:
        if call.kind == "torch" and not call.opaque:
            interpret(call.children, values)
            continue
        tensors = [values[slot.value] for slot in (*call.inputs, *call.captured)]
        with torch.set_grad_enabled(call.grad_enabled and torch.is_grad_enabled()):
            result = perform(call, tensors)
        if call.kind == "checkpoint" and not call.recompute:
            values.update(zip((slot.value for slot in call.outputs), result, strict=True))
        else:
            bind(call, result, values)


def bind(call: Call, result: Any, values: dict[int, Any]) -> None:
    """Note what a call returned under the numbers its outputs had in the trace."""
    from frostline.tracing.calls import tensors_in

    for slot, tensor in zip(call.outputs, tensors_in(result), strict=True):
        values[slot.value] = tensor


class Stage:
    """Where replays happen: a fake mode, and a way to lend tensors to the model for calls that reach into it.

    Args:
        fake_mode: the trace's own, since closures may hold its tensors.
        lend: leaf number -> stand-in; a context manager that puts them in the model's place.
    """

    def __init__(self, fake_mode: FakeTensorMode, lend: Callable[[dict[int, Tensor]], Any] | None = None) -> None:
        self.fake_mode = fake_mode
        self.lend = lend
