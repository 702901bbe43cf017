"""The rules, one a file: each reads the facts of a record and says what it found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from frostline.watching.finding import Finding, Level
from frostline.watching.record import Record
from frostline.watching.steps import Steps


@dataclass(frozen=True)
class Rule:
    """A rule: its id, its level, and what looks for it."""

    id: str
    level: Level
    find: Callable[[Record, Steps], Iterator[Finding]]


def rules() -> tuple[Rule, ...]:
    """Every rule, those of what is wrong first."""
    from frostline.watching.rules import unowned_grad

    return (unowned_grad.RULE,)
