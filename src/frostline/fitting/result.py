"""The value that ``fl.fit`` returns: the largest batch and length of each subset, and what holds the peak."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from frostline.costing.cost import Cost
from frostline.costing.moment import Moment
from frostline.fitting.axes import Axis
from frostline.fitting.freezing import Freezing
from frostline.subsets import Subset

if TYPE_CHECKING:
    from frostline.tracing.trace import Trace


@dataclass(frozen=True)
class Largest:
    """The largest batch, or the largest length.

    Attributes:
        kind: ``"batch"`` or ``"length"``.
        size: 0 if not even the smallest fits.
        at: the size that ``cost`` is of: ``size``, or if nothing fits the smallest that was traced.
        cost: there.
        next_bytes: the peak one size further, which is over the limit; None if something else ends it.
        bound: what ends it if not the memory; ``""`` if the memory does.
        freezing: what freezing one thing more would buy, the best first.
    """

    kind: str
    size: int
    at: int
    cost: Cost = field(repr=False)
    next_bytes: int | None
    bound: str
    freezing: tuple[Freezing, ...]

    @property
    def peak(self) -> Moment:
        """The fullest moment at that size."""
        return self.cost.peak

    @property
    def peak_bytes(self) -> int:
        return self.cost.peak_bytes


@dataclass(frozen=True)
class FitRow:
    """One subset by one method. ``length``: at the batch given; None where the step has no sequence length."""

    label: str
    batch: Largest
    length: Largest | None

    @property
    def subset(self) -> Subset:
        return self.batch.cost.subset

    @property
    def method(self) -> str:
        return self.batch.cost.method


@dataclass(frozen=True)
class Fit:
    """Rows of what fits into ``memory_bytes``; ``print(fit)`` is a table, ``fit["head"]`` one row.

    Attributes:
        memory_bytes: the limit. Peaks are allocated bytes, `predicted`.
        batch, length: which dimensions were taken for the batch and for the sequence length (None: there is none).
        trace: at the sizes given.
        scratch: whether scratch memory inside kernels was measured, and is in the peaks.
        num_traces: sizes that were traced.
    """

    rows: tuple[FitRow, ...]
    memory_bytes: int
    batch: Axis
    length: Axis | None
    trace: Trace = field(repr=False)
    scratch: bool
    num_traces: int
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[FitRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, label: str) -> FitRow:
        for row in self.rows:
            if row.label == label:
                return row
        raise KeyError(f"no row {label!r}; there is {', '.join(repr(row.label) for row in self.rows)}")

    def to_dict(self) -> dict[str, Any]:
        """Every figure, for JSON."""
        from frostline.reports.fit import fit_to_dict

        return fit_to_dict(self)

    def __str__(self) -> str:
        from frostline.reports.fit import fit_text

        return fit_text(self)
