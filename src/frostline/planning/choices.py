"""What a plan chooses from: tensors or layers, what each is worth, and what trains always or never."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

from frostline.costing.entry import bits_of
from frostline.errors import PlanError
from frostline.planning.problem import Choice
from frostline.subsets import blocks, resolve
from frostline.subsets.names import Names, listed, within

if TYPE_CHECKING:
    from frostline.tracing.trace import Trace

BY = ("tensor", "layer")


@dataclass(frozen=True)
class Offer:
    """What may train, by parameter name.

    Attributes:
        names: every parameter of the trace, by number.
        choices: what trains together; the first is what trains always, if anything does.
        scores: parameter -> what training it is worth.
        source: where the scores are from, in words.
        always, never: names.
        by: ``"tensor"`` or ``"layer"``.
    """

    names: Sequence[str]
    choices: Sequence[Choice]
    scores: Mapping[str, float]
    source: str
    always: tuple[str, ...]
    never: tuple[str, ...]
    by: str

    @property
    def values(self) -> list[float]:
        """What each parameter is worth, by number."""
        return [self.scores.get(name, 0.0) for name in self.names]


def offer(trace: Trace, importance: Any, always: Any, never: Any, by: str) -> Offer:
    """Read what a caller asks for.

    Raises:
        PlanError: importance with missing, negative or NaN entries; ``always`` and ``never`` that share a parameter, or
            leave nothing; an unknown ``by``.
        SubsetError: ``always`` or ``never`` matches nothing.
    """
    if by not in BY:
        raise PlanError(f"by must be {' or '.join(map(repr, BY))}, got {by!r}")
    names = list(trace.parameters)
    model = Names(trace.model)
    kept, barred = _names(trace, always, "always"), _names(trace, never, "never")
    both = [name for name in kept if name in set(barred)]
    if both:
        raise PlanError(f"{listed(both, 3)} is in always and in never: take it out of one of them")
    open_ = [names[n] for n in sorted(trace.trainable_numbers) if names[n] not in set(barred)]
    if not open_:
        raise PlanError("never takes away every parameter that could train: leave some to choose from")
    scores = _scores(importance, open_, model)
    choices = _choices(names, open_, kept, by, model)
    return Offer(names, choices, scores, _source(importance), kept, barred, by)


def _names(trace: Trace, asked: Any, what: str) -> tuple[str, ...]:
    if asked is None or (isinstance(asked, (list, tuple)) and not asked):
        return ()
    subset = resolve(asked, trace.model)
    if subset.slices:
        raise PlanError(
            f"{what}= names a slice, {subset.spelled()[0]!r}: a plan trains whole tensors, so name the tensor"
        )
    return subset.names


def _scores(importance: Any, open_: Sequence[str], model: Names) -> dict[str, float]:
    given = getattr(importance, "scores", importance)
    if not isinstance(given, Mapping):
        raise PlanError(
            "importance must be a mapping of parameter name to number, or have .scores that is one; got "
            f"{type(importance).__name__}"
        )
    unknown = [str(name) for name in given if name not in model.aliases]
    if unknown:
        raise PlanError(
            f"importance names {listed(unknown, 3)}, which is no parameter of this {type(model.model).__name__}: "
            "give it by the names of model.named_parameters()"
        )
    scores: dict[str, Any] = {}
    for name, value in given.items():
        first = model.aliases[name]
        if first in scores and scores[first] != value:
            raise PlanError(
                f"importance gives {first!r} and {name!r} different numbers, {scores[first]} and {value}, but they are "
                "one tied parameter: give one of them"
            )
        scores[first] = value
    missing = [name for name in open_ if name not in scores]
    if missing:
        raise PlanError(
            f"importance has no entry for {listed(missing, 3)} ({len(missing)} of {len(open_)} parameters): give each "
            "a number, or leave them out with never="
        )
    for name, value in scores.items():
        if isinstance(value, bool) or not (isinstance(value, Real) or hasattr(value, "item")):
            raise PlanError(f"the importance of {name!r} is {value!r}: give it a number")
    found = {name: float(scores[name]) for name in open_}
    wrong = [f"{name} ({value})" for name, value in found.items() if not math.isfinite(value) or value < 0]
    if wrong:
        raise PlanError(f"importance is negative or no finite number for {listed(wrong, 3)}: give each at least 0")
    return found


def _source(importance: Any) -> str:
    for attribute in ("measure", "source", "kind"):
        told = getattr(importance, attribute, None)
        if isinstance(told, str):
            return told
    return "the caller's mapping"


def _choices(names: Sequence[str], open_: Iterable[str], always: Sequence[str], by: str, model: Names) -> list[Choice]:
    number = {name: n for n, name in enumerate(names)}
    rest = [name for name in open_ if name not in set(always)]
    groups: dict[str, list[str]] = {}
    for name in rest:
        groups.setdefault(name if by == "tensor" else _layer_of(name, model), []).append(name)
    made = [Choice(label, bits_of(number[name] for name in inside)) for label, inside in groups.items()]
    fixed = [Choice("always", bits_of(number[name] for name in always), fixed=True)] if always else []
    return [*fixed, *made]


def _layer_of(name: str, model: Names) -> str:
    """The repeated block that a parameter is in (see `frostline.subsets.blocks`), or else the module that owns it."""
    found = model.__dict__.setdefault("_layers", blocks(model.model))
    return next((block for block in found if within(name, block)), name.rpartition(".")[0] or name)
