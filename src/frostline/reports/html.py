"""Reports for notebooks: the same tables and sentences as in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from frostline.costing.comparison import Comparison
from frostline.costing.cost import Cost
from frostline.costing.marginal import Marginal
from frostline.reports.findings import findings, reach, trained_words
from frostline.reports.header import header
from frostline.reports.lines import plain
from frostline.reports.table import EVERYTHING, Table, cost_table
from frostline.reports.text import cost_line, marginal_lines, with_everything

_CELL = "padding: 0.15em 0.8em; text-align: {}"
_WIDE = 10_000


def cost_html(cost: Cost) -> str:
    """One cost beside everything trained."""
    return _report([(str(cost.subset), cost)], f"<p>{escape(cost_line(cost))}</p>")


def comparison_html(comparison: Comparison) -> str:
    """Rows of costs, how far each reaches, and what was learnt."""
    return _report(comparison.rows)


def marginal_html(marginal: Marginal) -> str:
    """What each parameter would add or save."""
    return f"<pre>{escape(plain(marginal_lines(marginal)).strip())}</pre>"


def _report(rows: Sequence[tuple[str, Cost]], top: str = "") -> str:
    shown = with_everything(rows)
    traces = {id(cost.trace): cost.trace for _, cost in rows}.values()
    heads = "".join(_head(header(trace).lines()) for trace in traces)
    table = cost_table([label for label, _ in shown], [cost for _, cost in shown], _WIDE)
    far = [
        f"{label} trains {trained_words(cost)}; backward reaches {reach(cost)}"
        for label, cost in rows
        if label != EVERYTHING
    ]
    learnt = [finding.text for finding in findings(rows)]
    return f'<div class="frostline">{heads}{top}{_table(table)}{_list(far)}{_list(learnt)}</div>'


def _head(lines: Iterable[str]) -> str:
    first, *rest = lines
    return f"<p><b>{escape(first)}</b><br>{'<br>'.join(map(escape, rest))}</p>"


def _table(table: Table) -> str:
    def row(cells: Iterable[str], tag: str = "td") -> str:
        inside = "".join(
            f'<{tag} style="{_CELL.format("left" if column.left else "right")}">{escape(cell)}</{tag}>'
            for column, cell in zip(table.columns, cells, strict=True)
        )
        return f"<tr>{inside}</tr>"

    head = row([c.title for c in table.columns], "th") + row([c.unit for c in table.columns], "th")
    body = "".join(row([c.cells[i] for c in table.columns]) for i in range(table.num_rows))
    foot = row([c.basis for c in table.columns]) if table.foot() else ""
    return f"<table><thead>{head}</thead><tbody>{body}</tbody><tfoot>{foot}</tfoot></table>"


def _list(texts: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>"
