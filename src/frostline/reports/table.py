"""A table of costs: one unit a column, shares of training everything, the basis under each column."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from frostline.costing.breakdown import Row
from frostline.costing.cost import Cost
from frostline.reports.units import Unit, bytes_unit, flops_unit, percent, seconds_unit
from frostline.reports.units import total as sum_of

GAP = "  "
EVERYTHING = "(everything)"
"""The row that shares are shares of, where no row of the caller's is it."""


@dataclass(frozen=True)
class Column:
    """One column; every cell is text already, the last line says how its figures are known."""

    title: str
    unit: str
    cells: tuple[str, ...]
    basis: str = ""
    left: bool = False

    @property
    def width(self) -> int:
        return max(len(text) for text in (self.title, self.unit, self.basis, *self.cells))

    def pad(self, text: str) -> str:
        return text.ljust(self.width) if self.left else text.rjust(self.width)


@dataclass(frozen=True)
class Table:
    """Columns of equal height."""

    columns: tuple[Column, ...]

    @property
    def width(self) -> int:
        return sum(c.width for c in self.columns) + len(GAP) * (len(self.columns) - 1)

    @property
    def num_rows(self) -> int:
        return len(self.columns[0].cells)

    def head(self) -> list[str]:
        return [self._line([c.title for c in self.columns]), self._line([c.unit for c in self.columns])]

    def body(self) -> list[str]:
        return [self._line([c.cells[i] for c in self.columns]) for i in range(self.num_rows)]

    def foot(self) -> list[str]:
        return [self._line([c.basis for c in self.columns])] if any(c.basis for c in self.columns) else []

    def _line(self, cells: Sequence[str]) -> str:
        return GAP.join(c.pad(text) for c, text in zip(self.columns, cells, strict=True)).rstrip()


# What a table leaves out, the least first: narrower ones add columns up, and say what was added.
_LEFT_OUT: tuple[set[str], ...] = (
    {"backward", "grads+opt"},
    {"backward", "grads+opt", "±"},
    {"backward", "grads+opt", "±", "forward"},
    {"backward", "±", "forward", "gradients"},
    {"backward", "±", "forward", "gradients", "of saved"},
    {"±", "forward", "halves", "gradients"},
    {"±", "forward", "halves", "gradients", "of saved"},
    {"±", "forward", "halves", "gradients", "grads+opt", "of saved"},
    {"±", "forward", "halves", "gradients", "grads+opt", "of saved", "backward"},
    {"±", "forward", "halves", "gradients", "grads+opt", "of saved", "backward", "saved"},
)


def cost_table(labels: Sequence[str], costs: Sequence[Cost], width: int, label_title: str = "") -> Table:
    """The widest table of these costs that fits. Seconds are in it where they are known (``trace.calibrate``)."""
    columns = _columns(labels, costs, label_title)
    if len({cost.forward_flops for cost in costs}) > 1:  # then a row's backward does not tell its step
        columns = [("", column) if part == "forward" else (part, column) for part, column in columns]
    tables = [Table(tuple(column for part, column in columns if part not in out)) for out in _LEFT_OUT]
    return next((table for table in tables if table.width <= width), tables[-1])


def _columns(labels: Sequence[str], costs: Sequence[Cost], label_title: str) -> list[tuple[str, Column]]:
    """Every column, with the name of the part that a narrower table leaves out."""
    full = [cost.full for cost in costs]
    flops = flops_unit([c.step_flops for c in costs])
    kept = bytes_unit([max(c.saved_bytes, c.gradient_bytes + (c.optimizer_bytes or 0)) for c in costs])
    columns = [("", Column(label_title, "", tuple(labels), "basis", left=True))]
    said = all(cost.method in label or label == EVERYTHING for label, cost in zip(labels, costs, strict=True))
    if len({cost.method for cost in costs}) > 1 and not said:
        columns.append(("", Column("method", "", tuple(c.method for c in costs), "", left=True)))
    columns.append(("", Column("trains", "%", tuple(percent(c.num_trained, c.num_parameters, 2) for c in costs))))

    def amounts(part: str, title: str, unit: Unit, values: Iterable[float | None], *figures: str) -> None:
        columns.append((part, Column(title, unit.name, tuple(map(unit, values)), basis_word(costs, *figures))))

    def shares(part: str, values: Iterable[float | None], whole: Iterable[float | None]) -> None:
        pairs = zip(values, whole, strict=True)
        cells = tuple("-" if value is None or of is None else percent(value, of) for value, of in pairs)
        columns.append((part, Column("of all", "%", cells)))

    amounts("forward", "forward", flops, [c.forward_flops for c in costs], "forward_flops")
    amounts("halves", "grad_input", flops, [c.grad_input_flops for c in costs], "grad_input_flops")
    amounts("halves", "grad_weight", flops, [c.grad_weight_flops for c in costs], "grad_weight_flops")
    if any(cost.recompute_flops for cost in costs):
        amounts("halves", "recompute", flops, [c.recompute_flops for c in costs], "recompute_flops")
    amounts("backward", "backward", flops, [c.backward_flops for c in costs], "backward_flops")
    amounts("", "step", flops, [c.step_flops for c in costs], "step_flops")
    shares("", [c.step_flops for c in costs], [c.step_flops for c in full])
    found = [cost.seconds for cost in costs]
    seconds = [None if taken is None else taken.total for taken in found]
    if any(value is not None for value in seconds):
        unit = seconds_unit(seconds)
        amounts("", "time", unit, seconds, "step_seconds")
        amounts("±", "±", unit, [None if taken is None else taken.uncertainty for taken in found])
        shares("", seconds, [c.step_seconds for c in full])
    amounts("saved", "saved", kept, [c.saved_bytes for c in costs], "saved_bytes")
    shares("of saved", [c.saved_bytes for c in costs], [c.saved_bytes for c in full])
    amounts("gradients", "gradients", kept, [c.gradient_bytes for c in costs], "gradient_bytes")
    amounts("gradients", "optimizer", kept, [c.optimizer_bytes for c in costs], "optimizer_bytes")
    both = [sum_of(c.gradient_bytes, c.optimizer_bytes) for c in costs]
    amounts("grads+opt", "grads+opt", kept, both, "gradient_bytes", "optimizer_bytes")
    peaks = [cost.peak_bytes for cost in costs]
    amounts("", "peak", bytes_unit(peaks), peaks, "peak_bytes")
    shares("", peaks, [c.peak_bytes for c in full])
    return columns


def basis_word(costs: Sequence[Cost], *figures: str) -> str:
    """How a column is known: the weakest word among its rows. What was assumed is said below the table."""
    words = {cost.basis[figure].partition(":")[0] for cost in costs for figure in figures}
    return next((word for word in ("unknown", "assumed", "predicted", "measured", "exact") if word in words), "")


def row_table(rows: Sequence[Row], total: Cost, width: int, title: str) -> Table:
    """The table of a breakdown; its last row is the total."""
    for detail in (2, 1, 0):
        table = _rows(rows, total, title, detail)
        if table.width <= width:
            return table
    room = max(20, table.columns[0].width - (table.width - width))
    return _rows([replace(row, name=shortened(row.name, room)) for row in rows], total, title, 0)


def shortened(name: str, width: int) -> str:
    """The end of a name that is too long: that is where names differ.

    >>> shortened("encoder.layer.11.attention.weight", 20)
    '....attention.weight'
    """
    return name if len(name) <= width else "..." + name[-(width - 3) :]


def _rows(rows: Sequence[Row], total: Cost, title: str, detail: int) -> Table:
    sums = [*rows, _total_row(total)]
    flops = flops_unit([row.step_flops for row in sums])
    kept = bytes_unit([max(row.saved_bytes, row.gradient_bytes + row.optimizer_bytes) for row in sums])
    columns = [Column(title, "", tuple(row.name for row in sums), left=True)]

    def amounts(name: str, unit: Unit, figure: Callable[[Row], int]) -> None:
        columns.append(Column(name, unit.name, tuple(unit(figure(row)) for row in sums)))

    amounts("forward", flops, lambda r: r.forward_flops)
    if detail == 2:
        amounts("grad_input", flops, lambda r: r.grad_input_flops)
        amounts("grad_weight", flops, lambda r: r.grad_weight_flops)
        if total.recompute_flops:
            amounts("recompute", flops, lambda r: r.recompute_flops)
    else:
        amounts("backward", flops, lambda r: r.backward_flops)
    columns.append(Column("of step", "%", tuple(percent(row.step_flops, total.step_flops) for row in sums)))
    amounts("saved", kept, lambda r: r.saved_bytes)
    if detail:
        amounts("gradients", kept, lambda r: r.gradient_bytes)
        amounts("optimizer", kept, lambda r: r.optimizer_bytes)
    else:
        amounts("grads+opt", kept, lambda r: r.gradient_bytes + r.optimizer_bytes)
    return Table(tuple(columns))


def _total_row(cost: Cost) -> Row:
    return Row(
        "total",
        cost.forward_flops,
        cost.grad_input_flops,
        cost.grad_weight_flops,
        cost.recompute_flops,
        cost.saved_bytes,
        cost.gradient_bytes,
        cost.optimizer_bytes or 0,
        cost.moved_bytes,
        cost.num_trained,
    )
