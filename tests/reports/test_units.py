"""Numbers as people read them."""

from __future__ import annotations

import doctest

import pytest

from frostline.reports import header, names, peaks, sweep, table, units
from frostline.reports.units import bytes_text, flops_text, flops_unit, percent


@pytest.mark.parametrize("module", [header, names, peaks, sweep, table, units], ids=lambda module: module.__name__)
def test_the_examples_in_docstrings_hold(module: object) -> None:
    assert doctest.testmod(module).failed == 0  # type: ignore[arg-type]


def test_one_unit_serves_a_column_and_what_is_small_is_not_zero() -> None:
    unit = flops_unit([0, 3_000_000_000_000, 1])
    assert unit.name == "GFLOP"
    assert [unit(value) for value in (0, 3_000_000_000_000, 1)] == ["0", "3,000.0", "<0.1"]


def test_bytes_are_powers_of_1024_and_flops_of_1000() -> None:
    assert bytes_text(1024**3) == "1.00 GiB"
    assert flops_text(10**15) == "1.00 PFLOP"


def test_a_share_is_100_only_if_it_is_everything() -> None:
    assert percent(10**9, 10**9) == "100"
    assert percent(10**9 - 1, 10**9) == ">99.9"
