"""``freeze-missed``: something was written that looks like freezing and freezes nothing."""

from __future__ import annotations

import difflib
import linecache
import re
from collections.abc import Iterator
from typing import Any

from frostline.subsets.names import within
from frostline.watching.finding import Finding, Level
from frostline.watching.places import Place
from frostline.watching.record import ModelFact, ParameterFact, Record
from frostline.watching.rules import Rule
from frostline.watching.steps import Steps
from frostline.watching.wording import count, freeze, modules_of, named, names_of, optimizers_of, parts_of

ID = "freeze-missed"
FINE = "the attribute is your own, and means something else."
_MEANT = "requires_grad"


def find(record: Record, steps: Steps) -> Iterator[Finding]:
    """Modules with an attribute ``requires_grad``, and parameters with a misspelt one, whose parameters train."""
    for model in record.models:
        for attribute, facts in _on_parameters(model).items():
            yield _finding(record, model, parts_of(model, facts), attribute, facts, f"it is called {_MEANT}")
        for name, attribute, facts in _on_modules(model):
            if facts:
                yield _finding(record, model, [name], attribute, facts, f"only parameters have {_MEANT}")


def _on_modules(model: ModelFact) -> Iterator[tuple[str, str, list[ParameterFact]]]:
    for fact in model.modules.values():
        for attribute, value in vars(fact.module).items():
            if value is False and _looks_like_it(attribute, exact=True):
                inside = [p for p in model.parameters.values() if within(p.name, fact.name) and _trains(p)]
                yield fact.name, attribute, inside


def _on_parameters(model: ModelFact) -> dict[str, list[ParameterFact]]:
    found: dict[str, list[ParameterFact]] = {}
    for parameter in model.parameters.values():
        attributes: dict[str, Any] = getattr(parameter.parameter, "__dict__", {})
        for attribute, value in attributes.items():
            if value is False and _looks_like_it(attribute, exact=False) and _trains(parameter):
                found.setdefault(attribute, []).append(parameter)
    return found


def _looks_like_it(attribute: str, *, exact: bool) -> bool:
    if attribute == _MEANT:
        return exact
    return difflib.SequenceMatcher(None, attribute, _MEANT).ratio() >= 0.85


def _trains(fact: ParameterFact) -> bool:
    return fact.was_trainable and fact.got_gradient and not fact.was_frozen


def _finding(
    record: Record, model: ModelFact, parts: list[str], attribute: str, facts: list[ParameterFact], why: str
) -> Finding:
    what = named(record, model, parts)
    optimizers = optimizers_of(record, facts)
    place = _written(record, attribute)
    moved = sum(fact.moved for fact in facts)
    return Finding(
        rule=ID,
        level=Level.WRONG,
        text=f"{attribute} = False was set on {what}, which accepts it and freezes nothing: {why}.",
        place=str(place or ""),
        parameters=names_of(record, model, facts),
        modules=modules_of(record, model, facts),
        evidence=(
            f"{count(len(facts), 'tensor')} ({sum(f.numel for f in facts):,} numbers) inside still require grad and "
            f"got a gradient; {moved} moved over {count(record.num_steps, 'optimizer step')}",
        ),
        fix=freeze(model, parts, optimizers[0].place if optimizers else None),
        fine=FINE,
    )


def _written(record: Record, attribute: str) -> Place | None:
    """The line that sets the attribute, in the files that the script's own lines were seen in."""
    places = [each.place for each in record.optimizers] + [model.place for model in record.models]
    for path in dict.fromkeys(place.path for place in places if place is not None):
        for number, line in enumerate(linecache.getlines(path), start=1):
            if re.search(rf"\.{re.escape(attribute)}\s*=\s*False", line) and _is_not_a_parameters(line, attribute):
                return Place(path, number)
    return None


def _is_not_a_parameters(line: str, attribute: str) -> bool:
    return attribute != _MEANT or not re.search(r"\b(p|param|parameter|weight|bias)\.requires_grad\b", line)


RULE = Rule(ID, Level.WRONG, find)
