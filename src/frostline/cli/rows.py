"""Which subsets the rows of a table are: ``--train``, ``--freeze``, or the built-in ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from frostline.errors import SubsetError
from frostline.subsets import Subset, num_blocks, resolve

BUILT_IN = ("@now", "@head", "@last:1 2 4", "@biases", "@norms", "@all")
"""The rows when none is asked for."""


@dataclass(frozen=True)
class Asked:
    """One row asked for. ``optional``: the table does without it where it matches nothing."""

    label: str
    pattern: str
    optional: bool = False


def asked_rows(train: Sequence[str], freeze: Sequence[str], num_models: int = 1) -> list[Asked]:
    """The rows that ``--train`` and ``--freeze`` ask for; the built-in ones if they ask for none."""
    taken = ",".join(f"!{pattern.strip()}" for text in freeze for pattern in _split(text))
    if not train and freeze:
        return [Asked(f"@all {taken.replace(',', ' ')}", f"@all,{taken}")]
    rows = [row for text in (train or BUILT_IN) for row in _row(text)]
    if taken:
        rows = [Asked(f"{row.label} {taken.replace(',', ' ')}", f"{row.pattern},{taken}") for row in rows]
    return [Asked(row.label, row.pattern, not train or num_models > 1) for row in rows]


def _split(text: str) -> list[str]:
    """Commas part patterns, but not inside a slice."""
    return [part for part in re.split(r",(?![^\[]*\])", text) if part.strip()]


def _row(text: str) -> Iterable[Asked]:
    name, equals, pattern = text.partition("=")
    if not equals:
        name, pattern = "", text
    many = re.fullmatch(r"@last:(\d+(?:[ ,]+\d+)+)", pattern.strip())
    if many is None:
        yield Asked(name.strip() or pattern.strip(), pattern.strip())
        return
    for count in re.split(r"[ ,]+", many[1]):
        yield Asked(f"{name.strip()} {count}" if name.strip() else f"@last:{count}", f"@last:{count}")


def resolved(asked: Iterable[Asked], model: nn.Module) -> tuple[dict[str, Subset], list[str]]:
    """The subset of each row, those that are the same joined (``@now = @all``), and what is to say about the rest."""
    found: dict[Subset, list[str]] = {}
    notes: list[str] = []
    blocks: int | None = None
    for row in asked:
        if row.optional and row.pattern.startswith("@last:"):
            blocks = num_blocks(model) if blocks is None else blocks
            if blocks <= int(re.findall(r"\d+", row.pattern)[0]):
                continue
        try:
            subset = resolve(_planned(row.pattern), model)
        except SubsetError:
            if not row.optional:
                raise
            notes.append(f"no row {row.label}: nothing in this {type(model).__name__} matches it.")
            continue
        labels = found.pop(subset, []) if row.optional else found.get(subset, [])  # @all stays last when it joins @now
        found[subset] = [*labels, row.label]
    return {" = ".join(labels): subset for subset, labels in found.items()}, notes


def _planned(pattern: str) -> object:
    """The plan in a file that is named where a pattern could be; any other pattern as it is."""
    if not pattern.endswith(".json"):
        return pattern
    from frostline.planning.result import Plan

    return Plan.load(pattern)


def nothing_left(notes: Sequence[str], model: nn.Module) -> SubsetError:
    """The error when no row matched anything."""
    listed = "".join(f"\n  {note}" for note in notes)
    return SubsetError(f"no row is left for {type(model).__name__}:{listed}")
