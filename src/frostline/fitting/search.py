"""The largest size whose peak stays within a limit, in few traces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

Peak = Callable[[int], int | None]

_GROWTH = 256  # times: how far one step may go beyond what is known
_PATIENCE = 12  # steps between two ends before the middle is taken


def largest(
    peak: Peak, limit: int, known: Mapping[int, int | None], most: int | None = None, hints: Iterable[int] = ()
) -> int:
    """The size ``n`` with ``peak(n) <= limit < peak(n + 1)``; 0 if not even 1 fits; ``most`` if that fits.

    A peak is the greatest of many moments, each nearly a straight line in the batch: a convex curve. A chord between a
    size that fits and one that does not lies above it, and comes out too small; the line through two that fit, drawn
    further, comes out too large. Taken in turn they close in.

    Args:
        peak: size -> bytes; None where there can be no such size.
        limit: bytes.
        known: sizes already asked about, at least one.
        most: the largest size to ask about.
        hints: sizes after which there may be no more, such as the rows of tables.

    Assumes: what lies beyond a size that does not fit does not fit either.
    """
    asked = dict(known)
    steps, moved_up = 0, False
    while True:
        low = max((n for n, p in asked.items() if p is not None and p <= limit), default=0)
        high = min((n for n in asked if n > low), default=None)
        if high == low + 1 or (most is not None and low >= most):
            return low
        between = high is not None
        guess = (
            _guess(asked, limit, low, high, moved_up, hints) if steps < _PATIENCE else (low + (high or 2 * low)) // 2
        )
        guess = max(guess, low + 1)
        guess = min(guess, high - 1) if high is not None else min(guess, max(_GROWTH * low, 2))
        if most is not None:
            guess = min(guess, most)
        found = asked[guess] = peak(guess)
        moved_up = found is not None and found <= limit
        steps += between


def _guess(
    asked: Mapping[int, int | None], limit: int, low: int, high: int | None, moved_up: bool, hints: Iterable[int]
) -> int:
    sizes = sorted((n, p) for n, p in asked.items() if p is not None)
    below = [(n, p) for n, p in sizes if n <= low]
    above = [(n, p) for n, p in sizes if n > low]
    further = _crossing(below[-2], below[-1], limit) if len(below) > 1 else None
    if high is None:
        return 2 * low if further is None else further
    if not above:  # nothing is there from `high` on, whatever the memory
        if further is not None and further < high - 1:
            return further
        hints = sorted(hints)
        if low in hints:
            return low + 1
        return next((n for n in hints if low < n < high), (low + high) // 2)
    if not below:
        found = _crossing(above[0], above[1], limit) if len(above) > 1 else None
        return high // 2 if found is None else found
    if moved_up and further is not None and further < high:
        return further
    found = _crossing(below[-1], above[0], limit)
    return (low + high) // 2 if found is None else found


def _crossing(one: tuple[int, int], other: tuple[int, int], limit: int) -> int | None:
    """Where the line through two points reaches the limit, rounded down; None if it does not rise.

    >>> _crossing((1, 10), (3, 30), 55)
    5
    """
    (n, p), (m, q) = one, other
    if q <= p:
        return None
    return n + (limit - p) * (m - n) // (q - p)
