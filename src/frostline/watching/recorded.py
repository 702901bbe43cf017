"""A training script, run until its second step is recorded: that step as a model, its inputs and its loss."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from frostline.errors import TargetError
from frostline.watching.observer import Observer
from frostline.watching.record import Record
from frostline.watching.script import Enough, Script
from frostline.watching.steps import called_in
from frostline.watching.tape import Replay, Together

STEPS = 2


@dataclass(frozen=True)
class Recorded:
    """One step of a script.

    Attributes:
        model: as it was in that step, its modes and ``requires_grad`` included.
        inputs, loss: what the model was called with, and what made a scalar of its outputs; None where ``step`` is
            given.
        step: the whole step, where it is more than one call of one model.
        note: which of the script's steps this is.
    """

    model: nn.Module
    inputs: Any
    loss: Callable[[Any], Tensor] | None
    step: Callable[[nn.Module], Tensor] | None
    note: str


def recorded_step(path: str, args: list[str]) -> Recorded:
    """Run a script until its second optimizer step is over, and stop it there. What it prints goes to stderr.

    Raises:
        TargetError: it trains nothing, it failed before it trained, or its step could not be recorded.
    """
    record = Record(path)

    def stop(done: int) -> None:
        if done >= STEPS:
            raise Enough

    observer = Observer(record, stop)
    script = Script(path, args)
    observer.open()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            ended = script.run(lambda: None)
    finally:
        observer.close()
    if not record.num_passes:
        why = (
            f"failed before it trained (exit code {ended.code})" if ended.code else "trains nothing: it ran no backward"
        )
        raise TargetError(f"{path} {why}")
    passes = [each for each in record.passes if each.replay is not None and each.accumulates]
    if not passes:
        raise TargetError(f"the step of {path} could not be recorded: {_why_not(record)}")
    chosen = next((each for each in passes if each.step == STEPS - 1), passes[-1])
    replay = chosen.replay
    assert replay is not None
    replay.restore()
    more = sum(each.step == chosen.step and each.accumulates for each in record.passes) - 1
    note = f"step {chosen.step + 1} of {path}, the backward at {chosen.place}"
    if more:
        note += f" ({more} more in this step are not in the figures)"
    if replay.is_simple:
        inputs = _inputs(replay)
        if inputs is not None:
            return Recorded(replay.models[0], inputs, replay.loss, None, note)
    model = replay.models[0]
    if len(replay.models) > 1:
        model = Together(dict(zip(called_in(record, replay.models), replay.models, strict=True)))
    return Recorded(model, None, None, lambda _: replay.run(), note)


def _why_not(record: Record) -> str:
    """Why no backward of a script can be run again."""
    if not any(each.accumulates for each in record.passes):
        return "it takes its gradients by torch.autograd.grad; only what calls backward() can be costed"
    if not record.models and not record.notes:
        return "it called no torch.nn.Module with parameters; only a module's step can be costed"
    return "; ".join(dict.fromkeys(each.unrecorded for each in record.passes if each.unrecorded and each.accumulates))


def _inputs(replay: Replay) -> Any:
    """The model's arguments as a tuple, or as a mapping; None if they can be neither."""
    first = replay.entries[0]
    if not first.kwargs:
        return first.args
    if not first.args:
        return first.kwargs
    try:
        signature = inspect.signature(replay.models[0].forward)
        names = [name for name, each in signature.parameters.items() if each.kind is each.POSITIONAL_OR_KEYWORD]
    except (TypeError, ValueError):
        return None
    if len(first.args) > len(names):
        return None
    return {**dict(zip(names, first.args, strict=False)), **first.kwargs}
