"""Running one recorded call again, on stand-in tensors, under autograd.

`Stage` owns the fake mode the stand-ins live in and the model they may have to be lent to (a Function that closes over
a module). `perform` runs a call on given tensors; checkpointed regions are run by torch's own ``checkpoint`` over an
interpreter of the recorded ops, so recomputation and early stop are torch's, not ours.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from frostline.probing.attribution import Recording
from frostline.tracing.calls import Call, fill, tensors_in
from frostline.tracing.recorder import autocast
from frostline.tracing.stand_ins import stand_in


class _Seed(torch.autograd.Function):
    """Makes a tensor need a gradient without a copy, a view, or a leaf (which in-place ops refuse)."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, tensor: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        if gradient is None:
            return None, None
        received = _received.get(id(ctx))
        if received is not None:
            received(gradient)
        return None, None  # (an empty gradient for the token would be two ops more in the record of this backward)


_received: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


class Receiver:
    """Told the gradient that reaches one seeded input."""

    def __init__(self, sink: Callable[[Tensor], None]) -> None:
        self.sink = sink

    def __call__(self, gradient: Tensor) -> None:
        self.sink(gradient)


def seed(tensor: Tensor, sink: Callable[[Tensor], None]) -> tuple[Tensor, Tensor, Receiver]:
    """Make ``tensor`` need a gradient; returns it, the token to differentiate by, and the receiver to keep alive."""
    token = torch.empty((), requires_grad=True, device=tensor.device)
    seeded = _Seed.apply(token, tensor)  # type: ignore[no-untyped-call]
    receiver = Receiver(sink)
    _received[id(seeded.grad_fn)] = receiver
    return seeded, token, receiver


def perform(call: Call, tensors: Sequence[Tensor], recording: Recording | None = None) -> Any:
    """Run ``call`` with ``tensors`` in place of its inputs (and captured tensors), under the present grad mode."""
    if call.hooks is not None:
        with torch.autograd.graph.saved_tensors_hooks(*call.hooks):
            return perform(replace(call, hooks=None), tensors, recording)
    if call.kind == "op":
        return call.target(*fill(call.args, tensors), **fill(call.kwargs, tensors))
    if call.kind == "sequence":
        values = {slot.value: tensor for slot, tensor in zip(call.captured, tensors, strict=True)}
        wanted = [slot.value for slot in call.outputs]
        interpret(call.children, values, recording, wanted)
        return tuple(values[value] for value in wanted)
    with autocast(call.autocast):
        if call.kind == "torch":
            return call.target(*fill(call.args, tensors), **fill(call.kwargs, tensors))
        if call.kind == "function":
            return call.target.apply(*fill(call.args, tensors))
        return _perform_checkpoint(call, tensors, recording)


def _perform_checkpoint(call: Call, tensors: Sequence[Tensor], recording: Recording | None) -> Any:
    num_inputs = len(call.inputs)
    captured = {slot.value: tensor for slot, tensor in zip(call.captured, tensors[num_inputs:], strict=True)}
    region = call.recompute[0] if call.recompute else call
    wanted = [slot.value for slot in region.outputs]
    runs = 0

    def interpret_region(*given: Tensor) -> tuple[Tensor, ...]:
        nonlocal runs
        runs += 1
        values = dict(captured)
        values.update(zip((slot.value for slot in region.inputs), given, strict=True))
        again = recording.recompute() if runs > 1 and recording is not None else nullcontext()
        with autocast(()), again:
            interpret(region.children, values, recording, wanted)
        return tuple(values[value] for value in wanted)

    if call.is_reentrant and not call.recompute:  # no gradient went in: it only ran, without grad
        with torch.no_grad():
            return interpret_region(*tensors[:num_inputs])
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


def interpret(
    calls: Sequence[Call],
    values: dict[int, Any],
    recording: Recording | None = None,
    wanted: Sequence[int] | None = None,
) -> None:
    """Run recorded calls in order.

    Args:
        values: maps a trace's tensors to the ones to use, and receives the results.
        wanted: the results to be kept; others are let go after their last use, as the code that made them does. None:
            all of them.
    """
    last: dict[int, int] = {}
    if wanted is not None:
        for index, call in enumerate(calls):
            last.update(dict.fromkeys(_mentioned(call), index))
        for value in wanted:
            last.pop(value, None)
    over: dict[int, list[int]] = {}
    for value, index in last.items():
        over.setdefault(index, []).append(value)
    for index, call in enumerate(calls):
        if call.kind == "torch" and not call.opaque:
            interpret(call.children, values, recording)
        else:
            slots = (*call.inputs, *call.captured)
            tensors = [values[s.value] if s.value in values else stand_in(s.meta) for s in slots]  # (torch.tensor(...))
            with torch.set_grad_enabled(call.grad_enabled and torch.is_grad_enabled()):
                result = perform(call, tensors, recording)
            for slot, tensor in zip(call.outputs, tensors_in(result), strict=True):
                values[slot.value] = tensor
            del tensors, result
        for value in over.get(index, ()):
            values.pop(value, None)


def _mentioned(call: Call) -> Iterator[int]:
    """The tensors that a call takes, makes, or has inside."""
    for slot in (*call.inputs, *call.captured, *call.outputs):
        yield slot.value
    for child in call.children:
        yield from _mentioned(child)


class Stage:
    """Where replays happen: a fake mode, and a way to lend tensors to the model for calls that reach into it.

    Args:
        fake_mode: the trace's own, since closures may hold its tensors.
        lend: leaf number -> stand-in; a context manager that puts them in the model's place.
    """

    def __init__(
        self, fake_mode: FakeTensorMode, lend: Callable[[dict[int, Tensor]], AbstractContextManager[None]]
    ) -> None:
        self.fake_mode = fake_mode
        self.lend = lend
