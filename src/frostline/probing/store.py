"""Probes remembered: two calls that look alike are asked about once."""

from __future__ import annotations

from typing import Any

import torch

from frostline.probing.probe import Probe, Question, probe
from frostline.probing.replay import Stage
from frostline.tracing.calls import Call, Hole
from frostline.tracing.graph import Unit

_SIMPLE = (
    int,
    float,
    bool,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)
_shared: dict[Any, Probe] = {}  # for the whole process: probes of calls that no user object takes part in


def freeze(value: Any) -> Any:
    """A hashable form of a call's arguments. Raises TypeError for objects whose state it cannot see."""
    if isinstance(value, Hole):
        return ("hole", value.index)
    if isinstance(value, (tuple, list)):
        return tuple(freeze(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, freeze(item)) for key, item in sorted(value.items()))
    if isinstance(value, torch.Generator):
        return "generator"
    if isinstance(value, _SIMPLE):
        return (type(value).__name__, value)
    raise TypeError(f"{type(value).__name__} is not a plain value")


def likeness(call: Call) -> Any:
    """What two calls must share for their probes to be the same; None if only the call itself will do."""
    try:
        return _likeness(call, {})
    except TypeError:
        return None


def _likeness(call: Call, numbers: dict[int, int]) -> Any:
    inputs = tuple(
        (numbers.setdefault(slot.value, len(numbers)), slot.meta, slot.side, slot.is_leaf and call.kind != "op")
        for slot in (*call.inputs, *call.captured)
    )
    head = (call.kind, call.target, inputs, call.autocast, call.grad_enabled)
    if call.kind == "checkpoint":
        inside = call.recompute[0] if call.recompute else call
        for slot, argument in zip(call.inputs, inside.inputs, strict=False):
            numbers.setdefault(argument.value, numbers[slot.value])
        children = tuple(_likeness(child, numbers) for child in inside.children)
        wanted = tuple(numbers.get(slot.value, -1) for slot in inside.outputs)
        return (
            *head,
            freeze({k: v for k, v in call.options.items() if k != "context_fn"}),
            call.options.get("context_fn"),
            children,
            wanted,
        )
    if call.kind == "torch" and not call.opaque:
        return tuple(_likeness(child, numbers) for child in call.children)
    if call.kind == "function" and call.captured:
        raise TypeError("it reaches into its module")
    known = tuple((index, values.cpu().numpy().tobytes()) for index, values in call.known.items())
    result = (*head, freeze(call.args), freeze(call.kwargs), known)
    hash(result)
    for slot in call.outputs:
        numbers.setdefault(slot.value, len(numbers))
    return result


class ProbeStore:
    """Probes of one trace's units, by likeness and mask."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.num_asked = 0
        self._likeness: dict[Call, Any] = {}
        self._own: dict[Any, Probe] = {}

    def get(self, unit: Unit, question: Question) -> Probe:
        call = unit.call
        if call not in self._likeness:
            self._likeness[call] = likeness(call)
        like = self._likeness[call]
        memory, key = (self._own, (call, question)) if like is None else (_shared, (like, question))
        found = memory.get(key)
        if found is None:
            self.num_asked += 1
            found = memory[key] = probe(self.stage, unit, question)
        return found
