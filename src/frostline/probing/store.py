"""Probes remembered: two calls that look alike are asked about once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from frostline.probing.disk import disk, key_of
from frostline.probing.needs import Need, needs
from frostline.probing.probe import Gradient, Probe, Question, probe, real_gradients
from frostline.probing.replay import Stage
from frostline.tracing.calls import Call, freeze
from frostline.tracing.graph import Unit

T = TypeVar("T")

_shared: dict[Any, Probe] = {}  # for the whole process: probes of calls that no user object takes part in

_shared_gradients: dict[Any, tuple[Gradient, ...]] = {}
_shared_needs: dict[Any, tuple[Need, ...]] = {}
_by_values: set[Any] = set()  # calls that only real values can replay: boolean indices, sparse gradients


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
    head = (call.kind, call.target, inputs, call.autocast, call.grad_enabled, call.hooks, call.replaced)
    if call.kind == "sequence":
        children = tuple(_likeness(child, numbers) for child in call.children)
        return (*head, children, tuple(numbers.get(slot.value, -1) for slot in call.outputs))
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
        raise TypeError("it reaches into a module")
    result = (*head, freeze(call.args), freeze(call.kwargs))
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
        memory: dict[Any, Probe]
        key: Any
        if like is None:
            memory, key = self._own, (call, question)
        elif like in _by_values:
            memory, key = _shared, (like, question, _values(unit))
        else:
            memory, key = _shared, (like, question)
        found = memory.get(key)
        if found is None:
            found = self._recall_or_ask(unit, question, like)
            if found.by_values and like is not None:
                _by_values.add(like)
                key = (like, question, _values(unit))
            memory[key] = found
        return found

    def needs(self, unit: Unit, question: Question) -> tuple[Need, ...]:
        """What of each of the `Probe`'s ``held`` is needed."""
        held = self.get(unit, question).held
        return self._once(_shared_needs, unit, question, lambda: needs(unit, question, held))

    def gradients(self, unit: Unit, question: Question) -> tuple[Gradient, ...]:
        """The `Probe`'s ``gradients``, as real kernels leave them where gradients come in unusual strides."""
        found = self.get(unit, question).gradients
        if not question.strides:
            return found
        return self._once(
            _shared_gradients, unit, question, lambda: real_gradients(self.stage, unit, question) or found
        )

    def _once(self, memory: dict[Any, T], unit: Unit, question: Question, ask: Callable[[], T]) -> T:
        key = (self._likeness[unit.call], question)
        if key[0] is None:
            return ask()
        if key not in memory:
            memory[key] = ask()
        return memory[key]

    def _recall_or_ask(self, unit: Unit, question: Question, like: Any) -> Probe:
        call = unit.call
        plain = call.kind == "op" and call.hooks is None and not call.replaced
        lasting = like is not None and plain and call.target.namespace == "aten"
        kept = disk() if lasting else None
        name = "" if kept is None else key_of(like, question)
        found = None if kept is None else kept.get(name)
        if found is None:
            self.num_asked += 1
            found = probe(self.stage, unit, question)
            if kept is not None and not found.by_values:
                kept.put(name, found)
        return found


def _values(unit: Unit) -> tuple[bytes | None, ...]:
    return tuple(None if slot.known is None else slot.known.cpu().numpy().tobytes() for slot in unit.inputs)
