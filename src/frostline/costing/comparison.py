"""Several costs side by side: subsets, methods, or whole models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from frostline.costing.cost import RUN_METHODS, Cost
from frostline.errors import FrostlineError
from frostline.subsets import num_blocks

if TYPE_CHECKING:
    from frostline.tracing.trace import Trace


@dataclass(frozen=True)
class Comparison:
    """Labelled costs, in the order given. ``print(comparison)`` is a table; ``comparison["head"]`` is one cost."""

    rows: tuple[tuple[str, Cost], ...]

    def __iter__(self) -> Iterator[tuple[str, Cost]]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, label: str) -> Cost:
        for known, cost in self.rows:
            if known == label:
                return cost
        raise KeyError(f"no row {label!r}; there is {', '.join(repr(known) for known, _ in self.rows)}")

    @property
    def traces(self) -> tuple[Trace, ...]:
        """The traces behind the rows, each once, in order."""
        return tuple({id(cost.trace): cost.trace for _, cost in self.rows}.values())

    @property
    def only_method(self) -> str:
        """The method of all rows, or "" if they differ."""
        methods = {cost.method for _, cost in self.rows}
        return methods.pop() if len(methods) == 1 else ""

    def to_dict(self) -> dict[str, Any]:
        """Every figure of every row, for JSON."""
        from frostline.reports.data import comparison_to_dict

        return comparison_to_dict(self)

    def __str__(self) -> str:
        from frostline.reports.text import comparison_text

        return comparison_text(self)

    def _repr_html_(self) -> str:
        from frostline.reports.html import comparison_html

        return comparison_html(self)


def compare(costs: Mapping[str, Cost]) -> Comparison:
    """Set costs side by side, also of different models: ``fl.compare({"LoRA": cost_a, "last 4": cost_b})``.

    Shares in its table are of each row's own model with everything trained; the absolute figures compare across rows.
    """
    if not isinstance(costs, Mapping):
        raise FrostlineError(f"compare takes a mapping of label to Cost, not {type(costs).__name__}")
    if not costs:
        raise FrostlineError("compare got no costs")
    for label, cost in costs.items():
        if not isinstance(cost, Cost):
            raise FrostlineError(
                f"compare takes costs: {label!r} is {type(cost).__name__}. Write trace.cost(...) for it, or "
                "trace.compare({label: subset}) for subsets of one trace."
            )
    return Comparison(tuple((str(label), cost) for label, cost in costs.items()))


def compare_trace(trace: Trace, train: Any, methods: Any, optimizer: Any) -> Comparison:
    """See `frostline.tracing.trace.Trace.compare`.

    ``train`` is one subset (its rows are the methods: all that run unless told) or a mapping of label to subset (its
    rows are the subsets by ``freeze``, or subset after subset by every method asked for).
    """
    named = train if isinstance(train, Mapping) else {None: train}
    if not named:
        raise FrostlineError("compare got no subsets")
    if methods is None:
        methods = ("freeze",) if isinstance(train, Mapping) else RUN_METHODS
    methods = (methods,) if isinstance(methods, str) else tuple(methods)
    return Comparison(tuple(_rows(trace, named, methods, optimizer)))


def _rows(trace: Trace, named: Mapping[Any, Any], methods: Iterable[str], optimizer: Any) -> Iterator[tuple[str, Cost]]:
    methods = tuple(methods)
    for label, subset in named.items():
        for method in methods:
            cost = trace.cost(subset, method=method, optimizer=optimizer)
            name = str(cost.subset) if label is None else str(label)
            yield (name if len(methods) == 1 else f"{name} by {method}" if len(named) > 1 else method), cost


def sweep_last(trace: Trace, method: str = "freeze", optimizer: Any = "adamw") -> list[tuple[int, Cost]]:
    """The cost of the last K blocks for every K, from the head alone (0) to all blocks."""
    points: list[tuple[int, Cost]] = []
    for count in range(num_blocks(trace.model) + 1):
        try:
            points.append((count, trace.cost(f"@last:{count}" if count else "@head", method, optimizer)))
        except FrostlineError:
            if count:
                raise
    return points
