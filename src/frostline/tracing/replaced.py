"""The calls of a tape that `frostline.kernels` may run: what autograd does with them is asked under those kernels."""

from __future__ import annotations

from collections.abc import Iterable

from frostline.kernels import replaced_ops
from frostline.tracing.calls import Call

_DRAWN = ("aten::bernoulli_", "aten::native_dropout")


def mark_replaced(calls: Iterable[Call]) -> bool:
    """Mark every call that runs such an op, or user code that may; returns whether any of ``calls`` does.

    Dropout becomes several ops before autograd sees it, so that only the torch call around them can be asked.
    """
    names = replaced_ops()
    found = False
    for call in calls:
        inside = mark_replaced([*call.children, *call.recompute])
        if call.kind == "op":
            call.replaced = call.target._schema.name in names
        else:
            call.replaced = inside or call.kind in ("function", "checkpoint")
        if call.kind == "torch" and call.replayable and any(_draws(child) for child in call.children):
            call.opaque = call.replaced = True
        found = found or call.replaced
    return found


def _draws(call: Call) -> bool:
    return call.kind == "op" and call.target._schema.name in _DRAWN
