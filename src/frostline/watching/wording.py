"""What rules share in words and in code: names of what they are about, and the lines that mend it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from frostline.reports.names import collapsed
from frostline.subsets.names import listed
from frostline.watching.finding import Fix
from frostline.watching.places import Place, expression
from frostline.watching.record import ModelFact, ParameterFact, Record

_MOST_PARTS = 6


def parts_of(model: ModelFact, facts: Iterable[ParameterFact]) -> list[str]:
    """The largest modules of which all parameters are among ``facts``, and single parameters for the rest.

    The model itself is ``""``.
    """
    every = [fact.name for fact in model.parameters.values()]
    chosen = [fact.name for fact in facts]
    return [""] if len(chosen) == len(every) > 1 else collapsed(chosen, every)


def named(record: Record, model: ModelFact, parts: Sequence[str], limit: int = 4) -> str:
    return listed([record.spelled(model, part) for part in parts], limit)


def modules_of(record: Record, model: ModelFact, facts: Iterable[ParameterFact]) -> tuple[str, ...]:
    """The modules that own these parameters, each once."""
    owners = dict.fromkeys(fact.name.rpartition(".")[0] for fact in facts)
    return tuple(record.spelled(model, owner) for owner in owners)


def variable(model: ModelFact) -> str:
    return model.variable or "model"


def freeze(model: ModelFact, parts: Sequence[str], place: Place | None) -> Fix:
    """Lines that freeze these modules and parameters, to stand before a place."""
    called = variable(model)
    where = f"before {place}" if place is not None else "before the optimizer is made"
    written = [expression(model.module, called, part) for part in parts]
    if len(written) == 1:
        code = f"{written[0]}.requires_grad_(False)"
    elif len(written) <= _MOST_PARTS:
        code = f"for part in ({', '.join(written)}):\n    part.requires_grad_(False)"
    else:
        names = ", ".join(f'"{part}"' for part in parts)
        code = (
            f"for name, parameter in {called}.named_parameters():\n"
            f"    if name.startswith(({names})):\n"
            "        parameter.requires_grad_(False)"
        )
    return Fix(code, where, place.path if place else "", place.line if place else 0)
