"""Comparing the tape with everything trainable to the one with nothing: what runs may depend on ``requires_grad``.

Three outcomes, by how far the difference goes:

* inside one torch call (attention picks another kernel): the call is probed as a whole, per mask;
* into the strides of what follows (that kernel lays its result out otherwise): the run of calls up to where the tapes
  agree again becomes one call, of kind ``sequence``, probed as a whole;
* into which calls there are (Python code that asks for ``requires_grad``): said, and each subset is run as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from frostline.tracing.calls import Call, TensorMeta, is_view


def align(on: list[Call], off: list[Call], pairs: list[tuple[Call, Call]]) -> str:
    """Mark in ``on`` what has to be probed as a whole. Returns why the tapes cannot be aligned, or ''.

    Args:
        pairs: receives the calls that are one and the same, views left out.
    """
    ours, theirs = list(_significant(on)), list(_significant(off))
    runs: list[tuple[int, int]] = []  # first and last call of each run whose strides differ
    start = 0
    for index, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if _identity(a) != _identity(b):
            return f"what runs depends on requires_grad, in module {a.module or '(the model)'!r} ({a.name} or {b.name})"
        pairs.append((a, b))
        if _strides(a.inputs) != _strides(b.inputs):
            if runs and start <= runs[-1][1]:
                runs[-1] = (runs[-1][0], index)
            else:
                runs.append((start, index))
        elif _strides(a.outputs) != _strides(b.outputs) and not (runs and index <= runs[-1][1]):
            start = start if _still_differs(ours, theirs, start, index) else index
        if a.kind == "torch" and _op_sequence(a) != _op_sequence(b):
            if not a.replayable:
                return f"what {a.name} runs depends on requires_grad, in module {a.module or '(the model)'!r}"
            a.opaque = True
        elif a.kind == "checkpoint":
            regions = zip(a.recompute, b.recompute, strict=False) if a.is_reentrant else [(a, b)]
            for ours_inside, theirs_inside in regions:
                if why := align(ours_inside.children, theirs_inside.children, []):
                    return why
    if len(ours) != len(theirs):
        extra = (ours + theirs)[min(len(ours), len(theirs))]
        return f"what runs depends on requires_grad, in module {extra.module or '(the model)'!r} ({extra.name})"
    for first, last in reversed(runs):
        _fold(on, ours[first], ours[last])
    return ""


def _still_differs(ours: list[Call], theirs: list[Call], start: int, index: int) -> bool:
    """Whether a result laid out otherwise by call ``start`` is used at or after ``index``."""
    a, b = ours[start], theirs[start]
    if start == index or _strides(a.outputs) == _strides(b.outputs):
        return False
    made = {slot.value for slot in a.outputs}
    return any(slot.value in made for call in ours[index:] for slot in call.inputs)


def _fold(calls: list[Call], first: Call, last: Call) -> None:
    """Replace the run from ``first`` to ``last`` by one call with it inside."""
    begin, end = calls.index(first), calls.index(last) + 1
    run = calls[begin:end]
    for call in run:
        call.opaque = call.kind == "torch"
    folded = Call("sequence", None, (), {}, [], first.module, any(call.grad_enabled for call in run))
    folded.children = run
    folded.first_node, folded.end_node = first.first_node, max(call.end_node for call in run)
    calls[begin:end] = [folded]


def _significant(calls: list[Call]) -> Iterator[Call]:
    """Calls without views: autograd makes some of its own (``detach`` when it saves an output; a view's new node)."""
    for call in calls:
        if not (call.kind == "op" and is_view(call.target)):
            yield call


def _identity(call: Call) -> Any:
    return (call.kind, call.name, call.module, tuple(_shape(slot.meta) for slot in call.inputs))


def _shape(meta: TensorMeta) -> Any:
    return (meta.shape, meta.dtype, meta.device, meta.layout)


def _strides(slots: Any) -> Any:
    return [slot.meta.stride for slot in slots]


def _op_sequence(call: Call) -> list[Any]:
    return [(op.target, tuple(slot.meta for slot in op.inputs)) for op in call.ops() if not is_view(op.target)]
