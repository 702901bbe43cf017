"""Numbers as people read them: bytes in KiB, MiB, GiB; FLOPs in powers of 1000; s, ms or us; shares in percent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_BYTES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_SECONDS = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))
_FLOPS = ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP")


@dataclass(frozen=True)
class Unit:
    """One unit for a whole column, so that its numbers compare at a glance.

    >>> unit = bytes_unit([528, 27_040])
    >>> unit.name, unit(528), unit(27_040), unit(0), unit(1)
    ('KiB', '0.52', '26.41', '0', '<0.01')
    """

    name: str
    size: float
    decimals: int

    def __call__(self, value: float | None) -> str:
        """The number alone, without the unit; ``-`` for what is not known."""
        if value is None:
            return "-"
        return _fixed(value / self.size, self.decimals if self.size != 1 or isinstance(value, float) else 0)


def _fixed(value: float, decimals: int) -> str:
    """A number with fixed decimals; what would round to 0 says that it is not 0."""
    if value == 0:
        return "0"
    text = f"{value:,.{decimals}f}"
    if float(text.replace(",", "")) == 0:
        return f"<{10**-decimals:.{decimals}f}" if value > 0 else f"-{10**-decimals:.{decimals}f}<"
    return text


def _unit(values: Iterable[int | None], names: tuple[str, ...], base: int, most: int) -> Unit:
    """The smallest unit in which the largest value stays below ``most``."""
    largest = max((abs(v) for v in values if v is not None), default=0)
    power = 0
    while power + 1 < len(names) and largest >= most * base**power:
        power += 1
    size = base**power
    return Unit(names[power], size, 1 if largest >= 1000 * size else 2)


def bytes_unit(values: Iterable[int | None]) -> Unit:
    """The unit for a column of bytes: up to four digits before the point, so that small cells keep theirs."""
    return _unit(values, _BYTES, 1024, 10_000)


def flops_unit(values: Iterable[int]) -> Unit:
    """The unit for a column of FLOPs."""
    return _unit(values, _FLOPS, 1000, 10_000)


def seconds_unit(values: Iterable[float | None]) -> Unit:
    """The largest unit in which the largest value is at least 1.

    >>> unit = seconds_unit([0.1234, None, 0.0021])
    >>> unit.name, unit(0.1234), unit(0.0021), unit(None)
    ('ms', '123.4', '2.1', '-')
    """
    largest = max((abs(v) for v in values if v is not None), default=0.0)
    name, size = next(((name, size) for name, size in _SECONDS if largest >= size), _SECONDS[-1])
    return Unit(name, size, 1 if largest >= 100 * size else 2)


def seconds_text(value: float) -> str:
    """
    >>> seconds_text(0.1234), seconds_text(3.0), seconds_text(2.1e-5)
    ('123.4 ms', '3.00 s', '21.00 us')
    """
    unit = seconds_unit([value])
    return f"{unit(value)} {unit.name}"


def bytes_text(value: int) -> str:
    """
    >>> bytes_text(0), bytes_text(528), bytes_text(2704), bytes_text(1023 * 1024)
    ('0 B', '528 B', '2.64 KiB', '1.00 MiB')
    """
    unit = _unit([value], _BYTES, 1024, 1000)
    return f"{unit(value)} {unit.name}"


def flops_text(value: int) -> str:
    """
    >>> flops_text(676), flops_text(12_290), flops_text(21_828_000_000)
    ('676 FLOP', '12.29 kFLOP', '21.83 GFLOP')
    """
    unit = _unit([value], _FLOPS, 1000, 1000)
    return f"{unit(value)} {unit.name}"


def amount_text(figure: str, amount: float) -> str:
    """An amount of a figure of a cost, by the unit in its name.

    >>> amount_text("step_flops", 12_290), amount_text("peak_bytes", 2704), amount_text("trainable_parameters", 1200)
    ('12.29 kFLOP', '2.64 KiB', '1,200')
    >>> amount_text("step_seconds", 0.1234)
    '123.4 ms'
    """
    if figure == "step_seconds":
        return seconds_text(amount)
    if figure.endswith("_bytes"):
        return bytes_text(int(amount))
    return flops_text(int(amount)) if figure.endswith("_flops") else f"{int(amount):,}"


def amount_unit(figure: str, values: Iterable[float]) -> Unit:
    """The unit for a column of a figure's amounts.

    >>> amount_unit("step_flops", [12_290_000]).name, amount_unit("trainable_parameters", [3]).name
    ('MFLOP', '')
    """
    if figure == "step_seconds":
        return seconds_unit(values)
    whole = [int(value) for value in values]
    if figure.endswith("_bytes"):
        return bytes_unit(whole)
    return flops_unit(whole) if figure.endswith("_flops") else Unit("", 1, 0)


def difference(predicted: float | None, measured: float | None) -> str:
    """How far a prediction is off, in percent of what was measured; ``-`` where one is not known.

    >>> difference(103, 100), difference(1, 1), difference(99.999, 100), difference(None, 3), difference(97, 100)
    ('+3.0', '0', '>-0.1', '-', '-3.0')
    """
    if predicted is None or measured is None or (not measured and predicted):
        return "-"
    if predicted == measured:
        return "0"
    text = f"{100 * (predicted - measured) / measured:+.1f}"
    if float(text) == 0:
        return "<+0.1" if predicted > measured else ">-0.1"
    return text


def percent(part: float, whole: float, decimals: int = 1) -> str:
    """``part`` of ``whole`` as a number of percent; 100 and 0 only if it is so.

    >>> percent(1, 3), percent(1, 1), percent(99_999, 100_000), percent(1, 100_000), percent(0, 5), percent(1, 0)
    ('33.3', '100', '>99.9', '<0.1', '0', '-')
    """
    if not whole:
        return "-"
    if part == whole:
        return "100"
    text = _fixed(100 * part / whole, decimals)
    if part < whole and text == f"{100:.{decimals}f}":
        return f">{100 - 10**-decimals:.{decimals}f}"
    return text


def share(part: float, whole: float) -> str:
    """A share inside a sentence, to two digits or so.

    >>> share(1, 3), share(9, 10_000), share(1, 1), share(1, 10**7)
    ('33 %', '0.09 %', '100 %', '<0.01 %')
    """
    value = 100 * part / whole if whole else 0.0
    decimals = 0 if value >= 10 else 1 if value >= 1 else 2
    return f"{percent(part, whole, decimals)} %"


def ratio(more: float, less: float) -> str:
    """
    >>> ratio(3, 1)
    '3.0 x'
    """
    return f"{more / less:.1f} x" if less else "-"


def total(*values: int | None) -> int | None:
    """The sum; None if any part is not known, for unknown is not zero.

    >>> total(1, 2), total(1, None)
    (3, None)
    """
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
