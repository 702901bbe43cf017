"""The calls of a tape that `frostline.kernels` may run: what autograd does with them is asked under those kernels."""

from __future__ import annotations

from collections.abc import Iterable

from frostline.kernels import replaced_ops
from frostline.tracing.calls import Call, is_view

_DRAWN = ("aten::bernoulli_", "aten::native_dropout")


def mark_replaced(calls: Iterable[Call], views: set[int] | None = None) -> bool:
    """Mark every call that runs such an op, or user code that may; returns whether any of ``calls`` does.

    Dropout becomes several ops before autograd sees it, so that only the torch call around them can be asked. An op
    that writes to a view runs by torch's own kernel, which a stand-in for the view would not show.

    Args:
        views: the tensors, by value, that are views of others; those that ``calls`` make are added.
    """
    names = replaced_ops()
    views = set() if views is None else views
    found = False
    for call in calls:
        inside = mark_replaced([*call.children, *call.recompute], views)
        if call.kind == "op":
            to_a_view = _writes_to(call, views)
            if is_view(call.target) or to_a_view:
                views.update(slot.value for slot in call.outputs)
            call.replaced = call.target._schema.name in names and not to_a_view
        else:
            call.replaced = inside or call.kind in ("function", "checkpoint")
        if call.kind == "torch" and call.replayable and any(_draws(child) for child in call.children):
            call.opaque = True
            call.replaced = not any(_writes_to(child, views) for child in call.children)
        found = found or call.replaced
    return found


def _writes_to(call: Call, values: set[int]) -> bool:
    return call.kind == "op" and call.target._schema.is_mutable and any(s.value in values for s in call.inputs[:1])


def _draws(call: Call) -> bool:
    return call.kind == "op" and call.target._schema.name in _DRAWN
