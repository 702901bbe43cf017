"""What ``--importance`` reads: a file of numbers, or a measure by name. A measure is one entry of `NAMED`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from frostline.errors import PlanError

if TYPE_CHECKING:
    from frostline.planning.importance import Kind
    from frostline.tracing.trace import Trace


@dataclass(frozen=True)
class Importance:
    """Parameter -> what training it is worth, and where that is from."""

    scores: Mapping[str, float]
    source: str


def by_size(trace: Trace) -> Importance:
    """A tensor is worth its number of elements: what is told of it without a look at data or weights."""
    scores = {name: float(parameter.numel()) for name, parameter in trace.parameters.items()}
    return Importance(scores, "size: the number of elements")


def by_gradients(kind: Kind, trace: Trace) -> Importance:
    """What one backward says, on the inputs that the TARGET brings; see `frostline.planning.importance`."""
    from frostline.planning.importance import importance

    step = trace.rehearsal
    found = importance(trace.model, [None], kind=kind, step=lambda model, _: step.run(model, step.args, step.kwargs))
    return Importance(found.scores, f"{kind}, of one batch: what TARGET gives")


NAMED: dict[str, Callable[[Trace], Importance]] = {
    "size": by_size,
    "taylor": partial(by_gradients, "taylor"),
    "gradient_norm": partial(by_gradients, "gradient_norm"),
    "gradient_l1": partial(by_gradients, "gradient_l1"),
    "relative_gradient_norm": partial(by_gradients, "relative_gradient_norm"),
}


def read_importance(asked: str | None) -> Callable[[Trace], Importance]:
    """What ``--importance`` asks for, to be asked of a trace.

    Raises:
        PlanError: nothing was asked for, or there is no such measure or file.
    """
    known = f"FILE.json (parameter name -> number) or {', '.join(NAMED)}"
    if asked is None:
        raise PlanError(f"a plan needs to know what training each parameter is worth: give --importance {known}")
    if asked in NAMED:
        return NAMED[asked]
    path = Path(asked)
    if not path.is_file():
        raise PlanError(f"--importance {asked!r} is no file and no measure: give {known}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PlanError(f"--importance {asked!r} is no JSON ({error}): write parameter name -> number") from None
    scores = data.get("scores", data) if isinstance(data, dict) else data
    if not isinstance(scores, dict):
        raise PlanError(
            f'--importance {asked!r} holds no numbers by name: write {{"name": number}}, alone or as "scores"'
        )
    return lambda _: Importance(scores, path.name)
