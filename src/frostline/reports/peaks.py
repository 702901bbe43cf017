"""The fullest moment of each row: how much of what is in memory, and where in the step it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from frostline.costing.moment import Moment
from frostline.reports.lines import Line, table_lines
from frostline.reports.table import GAP, Column, Table, shortened
from frostline.reports.units import bytes_unit

_TITLES = {
    "weights": "weights",
    "inputs": "inputs",
    "gradients": "gradients",
    "optimizer_state": "optimizer",
    "saved_activations": "saved",
    "transients": "transients",
    "scratch": "scratch",
}
_NARROWER = {
    **_TITLES,
    "gradients": "grads+opt",
    "optimizer_state": "grads+opt",
    "transients": "rest",
    "scratch": "rest",
}
_NARROWEST = {**_NARROWER, "inputs": "rest"}


def peak_lines(title: str, rows: Sequence[tuple[str, Moment]], width: int) -> Iterator[Line]:
    """A table of bytes by kind, with the moment beside it where that fits, or else below it."""
    for titles in (_TITLES, _NARROWER, _NARROWEST):
        table = _amounts(title, rows, titles)
        if table.width <= width:
            break
    labels, *places = _places(rows, width)
    beside = Table((*table.columns, *places))
    yield Line("")
    if beside.width <= width:
        yield from table_lines(beside)
        return
    yield from table_lines(table)
    yield Line("")
    yield from table_lines(Table((labels, *places)))


def moment_words(moment: Moment) -> str:
    """
    >>> moment_words(Moment("backward", "aten.addmm.default", "blocks.5.up", {}))
    'the backward, aten.addmm in blocks.5.up'
    """
    if moment.phase == "optimizer":
        return "the optimizer's step"
    return f"the {moment.phase}, {_op(moment)} in {moment.module or '(the model)'}"


def largest_kinds(moment: Moment, count: int = 2) -> list[tuple[str, int]]:
    """The kinds of memory that hold the most, and their bytes.

    >>> largest_kinds(Moment("forward", "", "", {"weights": 1, "saved_activations": 3, "inputs": 0}))
    [('saved activations', 3), ('weights', 1)]
    """
    kinds = sorted(((n, kind) for kind, n in moment.by_kind.items() if n), reverse=True)
    return [(kind.replace("_", " "), n) for n, kind in kinds[:count]]


def moment_to_dict(moment: Moment) -> dict[str, Any]:
    """As data; ``by_kind`` adds up to the peak."""
    return {"phase": moment.phase, "op": moment.op, "module": moment.module, "by_kind": dict(moment.by_kind)}


def _amounts(title: str, rows: Sequence[tuple[str, Moment]], titles: dict[str, str]) -> Table:
    unit = bytes_unit([moment.nbytes for _, moment in rows])
    columns = [Column(title, "", tuple(label for label, _ in rows), left=True)]
    for name in dict.fromkeys(titles.values()):
        kinds = [kind for kind, called in titles.items() if called == name]
        sums = [sum(moment.by_kind[kind] for kind in kinds) for _, moment in rows]
        if any(sums):
            columns.append(Column(name, unit.name, tuple(map(unit, sums))))
    columns.append(Column("peak", unit.name, tuple(unit(moment.nbytes) for _, moment in rows)))
    return Table(tuple(columns))


def _places(rows: Sequence[tuple[str, Moment]], width: int) -> list[Column]:
    def column(title: str, text: Callable[[Moment], str]) -> Column:
        return Column(title, "", tuple(text(moment) for _, moment in rows), left=True)

    labels = Column("", "", tuple(label for label, _ in rows), left=True)
    phase, op = column("fullest in", lambda m: m.phase), column("op", _op)
    room = max(20, width - labels.width - phase.width - op.width - 3 * len(GAP))
    module = column("module", lambda m: shortened(m.module, room) if m.module or m.op == "step" else "(the model)")
    return [labels, phase, op, module]


def _op(moment: Moment) -> str:
    return moment.op.removesuffix(".default")
