"""The value that ``fl.measure`` returns: what was predicted beside what was measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from frostline.costing.cost import Cost
from frostline.measuring.measured import Measured
from frostline.subsets import Subset

if TYPE_CHECKING:
    from frostline.tracing.trace import Trace


@dataclass(frozen=True)
class MeasuredRow:
    """One subset by one method.

    Attributes:
        predicted: its cost from the trace.
        measured: what running it took; None if it could not be run, and ``error`` says why.
        detail: where the error was raised.
    """

    label: str
    predicted: Cost
    measured: Measured | None
    error: str = ""
    detail: str = field(default="", repr=False)

    @property
    def subset(self) -> Subset:
        return self.predicted.subset

    @property
    def method(self) -> str:
        return self.predicted.method


@dataclass(frozen=True)
class Measurement:
    """Rows of runs beside their predictions; ``print(measurement)`` is a table, ``measurement["head"]`` one row.

    Attributes:
        rows: in the order asked for; the last is full training, which ratios are of.
        again: full training once more, in a process of its own: how far two runs of the same thing lie apart.
        rounds: turns of each row.
        threads: of torch's operators.
        notes: what a reader should know, such as rows left out.
        timed_at: seconds of the reference kernel on the machine as fast as it was when ops were timed; None on
            accelerators, and where nothing was timed.
    """

    rows: tuple[MeasuredRow, ...]
    again: Measured | None
    rounds: int
    threads: int
    trace: Trace = field(repr=False)
    notes: tuple[str, ...] = ()
    timed_at: float | None = None

    def __iter__(self) -> Iterator[MeasuredRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, label: str) -> MeasuredRow:
        for row in self.rows:
            if row.label == label:
                return row
        raise KeyError(f"no row {label!r}; there is {', '.join(repr(row.label) for row in self.rows)}")

    @property
    def full(self) -> MeasuredRow:
        """Training everything."""
        return self.rows[-1]

    @property
    def noise(self) -> float | None:
        """How far the medians of two processes that train everything lie apart, as a share of their mean."""
        if self.full.measured is None or self.again is None:
            return None
        one, other = self.full.measured.step_seconds, self.again.step_seconds
        return abs(one - other) / ((one + other) / 2)

    @property
    def pace(self) -> float:
        """How many times as long the machine took for a reference kernel while rows ran as when their ops were timed.

        1 where that is not known. Predicted seconds times this are those of the machine that the rows ran on.
        """
        looks = [row.measured.reference_seconds for row in self.rows if row.measured is not None]
        known = [look for look in looks if look is not None]
        return statistics.median(known) / self.timed_at if known and self.timed_at else 1.0

    def ratio(self, row: MeasuredRow) -> float | None:
        """The measured seconds of a row, as a share of full training's."""
        if row.measured is None or self.full.measured is None:
            return None
        return row.measured.step_seconds / self.full.measured.step_seconds

    def predicted_ratio(self, row: MeasuredRow) -> float | None:
        """The predicted seconds of a row, as a share of full training's."""
        own, full = row.predicted.step_seconds, self.full.predicted.step_seconds
        return None if own is None or not full else own / full

    def to_dict(self) -> dict[str, Any]:
        """Every figure, for JSON."""
        from frostline.reports.measurement import measurement_to_dict

        return measurement_to_dict(self)

    def __str__(self) -> str:
        from frostline.reports.measurement import measurement_text

        return measurement_text(self)
