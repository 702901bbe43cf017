"""Lines of a report: plain text with a style each, so that width and colour are the caller's choice."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from frostline.reports.table import Table

WIDTH = 100


@dataclass(frozen=True)
class Line:
    """One line; ``style`` is rich's."""

    text: str
    style: str = ""


def plain(lines: Iterable[Line]) -> str:
    return "\n".join(line.text for line in lines)


def header_lines(lines: Iterable[str], width: int) -> Iterator[Line]:
    for number, text in enumerate(lines):
        for part in wrapped(text, width, "  "):
            yield Line(part, "bold" if number == 0 else "")


def table_lines(table: Table, total: bool = False) -> Iterator[Line]:
    title, unit = table.head()
    yield Line(title, "bold")
    if unit:
        yield Line(unit, "dim")
    body = table.body()
    for number, text in enumerate(body):
        yield Line(text, "bold" if total and number == len(body) - 1 else "")
    for text in table.foot():
        yield Line(text, "dim")


def bullet(text: str, width: int, style: str = "") -> Iterator[Line]:
    for part in wrapped(f"- {text}", width, "  "):
        yield Line(part, style)


def wrapped(text: str, width: int, indent: str) -> list[str]:
    """Lines of at most ``width``; a number stays with its unit.

    >>> wrapped("it takes 12 ms", 12, ""), wrapped("it takes 12 steps", 12, "")
    (['it takes', '12 ms'], ['it takes 12', 'steps'])
    """
    kept = re.sub(r"(?<=\d) (?=(%|x|[KMGTP]?i?B|[kMGTPE]?FLOPs?|[mu]?s)\b|%)", "\u00a0", text)
    lines = textwrap.wrap(kept, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\u00a0", " ") for line in lines]
