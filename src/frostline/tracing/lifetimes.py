"""How long the step's own code holds each tensor: what autograd does not keep is let go when Python lets go of it.

The run with nothing trainable shows it, since there is no graph; its storages are those of the other run by the calls
that made them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import NamedTuple

from frostline.tracing.calls import Call, is_view
from frostline.tracing.recorder import Recorder


class Lifetimes(NamedTuple):
    """Per storage of the tape, as op orders: the op that made it, and the first before which the code let it go.

    Storages that were there before the step, and those that only a trainable run makes, have ``born == died``.
    """

    born: tuple[int, ...]
    died: tuple[int, ...]
    found: frozenset[int] = frozenset()  # storages that were there before the step and that it uses


def lifetimes(on: Recorder, off: Recorder, pairs: Iterable[tuple[Call, Call]]) -> Lifetimes:
    """The lifetimes of the storages of ``on``, read off ``off``.

    Args:
        on: recorded with everything trainable; ``off``: with nothing, holding no tensor itself.
        pairs: calls of the two that are the same.
    """
    end = on.num_ops
    ours: dict[int, int] = {}  # storage of `off` -> of `on`
    moments: list[tuple[int, int]] = []  # orders of the same op in both
    for a, b in pairs:
        inside, theirs = _kernels(a), _kernels(b)
        same = len(inside) == len(theirs) and all(x.target is y.target for x, y in zip(inside, theirs, strict=True))
        for x, y in zip(inside, theirs, strict=True) if same else [(a, b)]:
            ours.update(zip((s.storage for s in y.outputs), (s.storage for s in x.outputs), strict=False))
        moments += [(y.order, x.order) for x, y in zip(inside, theirs, strict=False)]
    born, found = _births(on)
    died = list(born)
    moments.sort()
    orders = [order for order, _ in moments]
    for theirs_number, number in ours.items():
        if born[number] < end:
            place = bisect_left(orders, off.died.get(theirs_number, off.num_ops + 1))
            lasts = theirs_number not in off.died
            # (It was let go after the last op that ran before, whichever views lie between.)
            died[number] = end + 1 if lasts else max(born[number], moments[place - 1][1]) + 1 if place else end
    return Lifetimes(tuple(born), tuple(died), found)


def _births(recorder: Recorder) -> tuple[list[int], frozenset[int]]:
    """Per storage: the op that made it (``num_ops`` if none did); and those that were there before they were used."""
    born: dict[int, int] = {}
    found: set[int] = set()
    for op in recorder.root.ops():
        for slot in op.inputs:
            if slot.storage not in born:
                born[slot.storage] = recorder.num_ops
                if slot.meta.shape:  # (a Python number in an op is no tensor of the step's)
                    found.add(slot.storage)
        for slot in op.outputs:
            born.setdefault(slot.storage, op.order)
    return [born.get(number, recorder.num_ops) for number in range(len(recorder.storage_bytes))], frozenset(found)


def _kernels(call: Call) -> list[Call]:
    return [op for op in call.ops() if not is_view(op.target)]
