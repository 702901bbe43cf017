"""One step run again as a whole, for one set of flags: the answer where its calls cannot be asked one by one.

That is so where what autograd holds, or where a gradient goes, depends on more than the flags of one call: a reentrant
checkpoint that captures an activation, a checkpoint or a view that keeps another graph alive, a forward that asks for
``requires_grad``. It takes a run for each subset, and so is the exception.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from frostline.kernels import eager_kernels, settle, watched_kernels
from frostline.probing.attribution import RanOp, Recording
from frostline.probing.probe import go_backward
from frostline.tracing.calls import Call, Side, grad_fn_of, tensors_in
from frostline.tracing.interception import is_reentrant_checkpoint, observed_by
from frostline.tracing.recorder import CallMode, OpMode, Recorder, recording
from frostline.tracing.rehearsal import Rehearsal


@dataclass(frozen=True)
class WholeStep:
    """What one step did.

    Attributes:
        forward: its op calls before the loss returned, in order.
        backward: the ops that backward ran.
        held: the storages (by the forward's numbers) that autograd held when the loss returned.
        trained: the parameters that got a gradient, by number, and the bytes of those that are sparse.
        parameter_of_leaf: index of a leaf -> parameter number.
        alive: per op of the forward: bytes of what the step had made, and that lived, when it returned.
        real: whether it ran on real tensors.
        refusal: why autograd would not run this, where it would not.
    """

    forward: tuple[Call, ...]
    backward: tuple[RanOp, ...]
    held: frozenset[int]
    storage_bytes: list[int]
    trained: frozenset[int]
    sparse: tuple[tuple[int, int], ...]
    parameter_of_leaf: dict[int, int]
    alive: tuple[int, ...]
    real: bool
    refusal: str = ""


@eager_kernels()
def run_whole(
    rehearsal: Rehearsal, trainable: frozenset[int], wanted: frozenset[int] | None = None, *, lean: bool = False
) -> WholeStep:
    """Run the step twice: once to see what stays alive, once to see what runs.

    Args:
        trainable: the parameters, by number, that require grad.
        wanted: those whose gradients ``backward(inputs=...)`` asks for; None: ``backward()``.
        lean: under frostline's own kernels.
    """
    kernels = watched_kernels if lean else nullcontext
    held, storage_bytes = _held(rehearsal, trainable, kernels)
    followed = Recording()
    with kernels(), rehearsal.staged(trainable, keep=False) as staged:
        recorder, lender = staged.recorder, staged.lender
        followed.follow(lender.parameters, [Side.WEIGHT] * len(lender.parameters))
        followed.follow(lender.constants, [Side.CONSTANT] * len(lender.constants))
        given = list(tensors_in((staged.args, staged.kwargs)))
        followed.follow(given, [Side.DATA] * len(given))
        followed.count_anew()
        alive = followed.alive_log = []
        ops = OpMode(recorder, fake=not rehearsal.real)
        with observed_by(_Watcher(recorder, followed)), ops, followed:
            with CallMode(recorder):
                loss = rehearsal.perform(staged)
            forward = tuple(recorder.root.ops())
            recorder.current = Call("torch", None, (), {}, [], "", True)  # what backward runs is no part of the tape
            parameters = dict(lender.numbered())
            targets = None if wanted is None else [p for number, p in parameters.items() if number in wanted]
            followed.alive_log = None
            followed.listening = True
            with followed.watching_nodes():
                refusal = go_backward(loss, None, targets) if loss.requires_grad else ""
            followed.listening = False
        leaves = {recorder._leaf(p): number for number, p in parameters.items()}
    got = {number: p.grad for number, p in parameters.items() if p.grad is not None}
    sparse = tuple((n, g._indices().nbytes + g._values().nbytes) for n, g in got.items() if g.is_sparse)
    backward = followed.take()
    made = tuple(alive)
    return WholeStep(
        forward, backward, held, storage_bytes, frozenset(got), sparse, leaves, made, rehearsal.real, refusal
    )


def _held(
    rehearsal: Rehearsal, trainable: frozenset[int], kernels: Any, outside: frozenset[int] = frozenset()
) -> tuple[frozenset[int], list[int]]:
    """The storages that autograd holds when the loss returns, and the bytes of all: what only its nodes refer to.

    Args:
        outside: tensors, by number, that the step leaves somewhere (in a list, say): they are to keep no graph alive.
    """
    gc.freeze()  # what is there already need not be looked through: a large process would take seconds each time
    try:
        with kernels() as run:
            root, recorder, excluded = _root(rehearsal, trainable)
        _ungraph(recorder, outside)
        gc.collect()
        settle()
        packed = [] if run is None else [h.packed_nbytes for h in run.holders() if h.packed_nbytes] + run.kept_aside()
        before = _references(recorder)
        del root
        gc.collect()
        after = _references(recorder)
        left = _with_graph(recorder)
    finally:
        gc.unfreeze()
    if left and not outside:
        return _held(rehearsal, trainable, kernels, left)
    held = {number for key, (number, count) in before.items() if count > after.get(key, (number, 0))[1]}
    known = len(recorder.storage_bytes)
    held.update(range(known, known + len(packed)))
    return frozenset(held - excluded), [*recorder.storage_bytes, *packed]


def _with_graph(recorder: Recorder) -> frozenset[int]:
    return frozenset(value for value, _, tensor in recorder.living() if grad_fn_of(tensor) is not None)


def _ungraph(recorder: Recorder, values: frozenset[int]) -> None:
    for value, _, tensor in recorder.living():
        if value in values and not tensor._is_view():
            tensor.detach_()


def _root(rehearsal: Rehearsal, trainable: frozenset[int]) -> tuple[Any, Recorder, frozenset[int]]:
    """Where the backward of one step starts, and a recorder that knows its tensors; all else is let go."""
    with rehearsal.staged(trainable, keep=False) as staged:
        recorder = staged.recorder
        with recording(recorder, fake=not rehearsal.real):
            root = rehearsal.perform(staged).grad_fn
    recorder.forget_graph()
    return root, recorder, staged.excluded


def _references(recorder: Recorder) -> dict[Any, tuple[int, int]]:
    """How often each storage and each tensor that lives is referred to: key -> (storage, count)."""
    counts: dict[Any, tuple[int, int]] = {
        address: (recorder.number_of(address), torch._C._storage_Use_Count(address))
        for address, ref in recorder.storage_refs.items()
        if not ref.expired()
    }
    for value, storage, tensor in recorder.living():
        counts["tensor", value] = (storage, tensor._use_count())  # type: ignore[attr-defined]
    return counts


class _Watcher:
    """Shows a recorder and a `Recording` one and the same step, and says what of it is recomputation."""

    def __init__(self, recorder: Recorder, followed: Recording) -> None:
        self.recorder = recorder
        self.followed = followed

    def on_module(self, module: Any, run: Callable[[], Any]) -> Any:
        return self.recorder.on_module(module, run)

    def on_apply(self, cls: type, args: tuple[Any, ...], run: Callable[..., Any]) -> Any:
        if is_reentrant_checkpoint(cls):
            args = (self.run_again(args[0]), *args[1:])
        result = self.recorder.on_apply(cls, args, run)
        self.followed.note_function(args, result)
        return result

    def checkpoint_region(self, *region: Any) -> AbstractContextManager[None]:
        return self.recorder.checkpoint_region(*region)

    def run_again(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def marked(*args: Any, **kwargs: Any) -> Any:
            if not self.followed.listening:
                return function(*args, **kwargs)
            with self.followed.recompute():
                return function(*args, **kwargs)

        return marked
