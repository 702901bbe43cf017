"""What rules share in words and in code: names of what they are about, and the lines that mend it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from frostline.reports.names import collapsed
from frostline.subsets.names import listed
from frostline.watching.finding import Fix
from frostline.watching.places import Place, expression
from frostline.watching.record import ModelFact, OptimizerFact, ParameterFact, Record

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


def names_of(record: Record, model: ModelFact, facts: Iterable[ParameterFact]) -> tuple[str, ...]:
    return tuple(record.spelled(model, fact.name) for fact in facts)


def modules_of(record: Record, model: ModelFact, facts: Iterable[ParameterFact]) -> tuple[str, ...]:
    """The modules that own these parameters, each once."""
    owners = dict.fromkeys(fact.name.rpartition(".")[0] for fact in facts)
    return tuple(record.spelled(model, owner) for owner in owners)


def called(fact: ModelFact | OptimizerFact, place: Place | None) -> str:
    """What code at a place calls it; a word that stands for it where it has no name there."""
    known = _known(fact, place)
    return known or ("model" if isinstance(fact, ModelFact) else "optimizer")


def _known(fact: ModelFact | OptimizerFact, place: Place | None) -> str:
    scopes = fact.names if place is None else place.scopes
    return next((fact.names[scope] for scope in scopes if scope in fact.names), "")


def count(number: int, noun: str) -> str:
    """
    >>> count(1, "step"), count(1200, "step")
    ('1 step', '1,200 steps')
    """
    return f"{number:,} {noun}{'s' * (number != 1)}"


def made(optimizer: OptimizerFact) -> str:
    """An optimizer in words.

    >>> made(OptimizerFact(0, [], None))
    'list (made before the watching began)'
    """
    return f"{optimizer.kind} ({optimizer.place or 'made before the watching began'})"


def optimizers_of(record: Record, facts: Iterable[ParameterFact]) -> list[OptimizerFact]:
    """The optimizers that step and hold any of these."""
    numbers = {number for fact in facts for number in fact.owners}
    return [each for each in record.stepped if each.number in numbers]


def freeze(model: ModelFact, parts: Sequence[str], place: Place | None, remark: str = "") -> Fix:
    """Lines that freeze these modules and parameters, to stand before a place."""
    return _each(model, parts, "requires_grad_(False)", place, "before the optimizer is made", remark)


def take_in(model: ModelFact, parts: Sequence[str], optimizer: OptimizerFact) -> Fix:
    """A line that gives these modules and parameters, which were frozen at first, to an optimizer."""
    modules = {fact.name for fact in model.modules.values()}
    written = [(part in modules, expression(model.module, called(model, None), part)) for part in parts]
    held = ", ".join(f"*{text}.parameters()" if whole else text for whole, text in written)
    code = f'{called(optimizer, None)}.add_param_group({{"params": [{held}]}})  # or leave them frozen'
    return before(None, code, "once, where they are unfrozen", model, optimizer)


def set_eval(model: ModelFact, modules: Sequence[str], place: Place | None) -> Fix:
    """Lines that put modules into eval mode, to stand where train mode was set last."""
    return _each(model, modules, "eval()", place, "after every call of train()")


def _each(
    model: ModelFact, parts: Sequence[str], call: str, place: Place | None, otherwise: str, remark: str = ""
) -> Fix:
    written = [expression(model.module, called(model, place), part) for part in parts]
    said = f"  # {remark}" if remark else ""
    if len(written) == 1:
        code = f"{written[0]}.{call}{said}"
    elif len(written) <= _MOST_PARTS:
        code = f"for part in ({', '.join(written)}):{said}\n    part.{call}"
    else:
        lines = "".join(f"    {each},\n" for each in written)
        code = f"for part in ({said}\n{lines}):\n    part.{call}"
    return before(place, code, otherwise, model)


def before(place: Place | None, code: str, otherwise: str, *used: ModelFact | OptimizerFact) -> Fix:
    """Code that stands before a line; where that is not known, ``otherwise`` says where.

    ``used``: what the code names by what it is `called` there.
    """
    nameless = [fact for fact in used if not _known(fact, place)]
    said = "".join(
        f"# {called(fact, place)}: the {fact.kind}, which no variable was seen to name here\n" for fact in nameless
    )
    if place is None:
        return Fix(said + code, otherwise)
    return Fix(said + code, f"before {place}", place.path, place.line)
