"""The search: the size it finds, and how few it asks about."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from frostline.fitting.search import largest


def two_lines(n: int) -> int:
    """Until 40 one moment holds the peak, then another, which grows faster."""
    return max(1000 + 10 * n, 25 * n + 400)


CURVES: dict[str, Callable[[int], int]] = {
    "a line": lambda n: 500 + 7 * n,
    "two lines": two_lines,
    "a square": lambda n: 100 + 3 * n * n,
    "flat, then a line": lambda n: max(2000, 10 * n),
    "whole blocks": lambda n: -(-(300 + 11 * n) // 512) * 512,
}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("limit", [2500, 10_000, 1_000_003])
def test_what_it_finds_fits_and_one_more_does_not(curve: str, limit: int) -> None:
    asked: list[int] = []

    def peak(n: int) -> int:
        asked.append(n)
        return CURVES[curve](n)

    known = {4: peak(4), 8: peak(8)}
    n = largest(peak, limit, known)
    assert CURVES[curve](n) <= limit < CURVES[curve](n + 1)
    assert len(asked) <= 12
    assert len(set(asked)) == len(asked)


def test_a_line_takes_two_more() -> None:
    asked: list[int] = []

    def peak(n: int) -> int:
        asked.append(n)
        return 500 + 7 * n

    assert largest(peak, 100 * 7 + 500, {1: peak(1), 2: peak(2)}) == 100
    assert asked == [1, 2, 100, 101]


def test_what_is_known_may_be_too_large_already() -> None:
    assert largest(lambda n: 10 * n, 55, {64: 640, 128: 1280}) == 5
    assert largest(lambda n: 10 * n, 9, {64: 640, 128: 1280}) == 0


def test_nothing_above_the_most_is_asked_about() -> None:
    def peak(n: int) -> int:
        assert n <= 20
        return n

    assert largest(peak, 10**6, {4: 4, 8: 8}, most=20) == 20


def test_sizes_that_cannot_be_end_it_like_those_that_do_not_fit() -> None:
    asked: list[int] = []

    def peak(n: int) -> int | None:
        asked.append(n)
        return n if n <= 512 else None

    assert largest(peak, 10**6, {8: 8, 16: 16}, hints=(64, 512)) == 512
    assert 513 in asked
    assert largest(lambda n: n if n <= 300 else None, 10**6, {8: 8, 16: 16}) == 300
    assert largest(lambda n: n if n > 1 else None, 10**6, {2: 2, 4: 4}, most=4) == 4  # (batch norm wants two)
