"""An audit as text: what went beyond the plan, then what is worth knowing."""

from __future__ import annotations

from collections.abc import Iterator

from frostline.reports.lines import WIDTH, Line, bullet, header_lines, plain
from frostline.reports.units import bytes_text, flops_text
from frostline.running.audit import Audit, Finding


def audit_text(audit: Audit, width: int = WIDTH) -> str:
    return plain(audit_lines(audit, width))


def audit_lines(audit: Audit, width: int = WIDTH) -> Iterator[Line]:
    """A verdict, the step's figures, and the findings."""
    count = len(audit.beyond)
    verdict = f"{count} thing{'s' * (count > 1)} beyond the plan" if count else "nothing beyond the plan"
    facts = [f"audit of a step that trains {audit.subset}: {verdict}", _figures(audit)]
    yield from header_lines(facts, width)
    for finding in audit.findings:
        yield from bullet(_sentence(finding), width, "yellow" if finding.beyond else "dim")


def _figures(audit: Audit) -> str:
    calls = sum(op.num_calls for op in audit.ops)
    figures = f"backward {flops_text(audit.backward_flops)} in {calls:,} ops; kept {bytes_text(audit.kept_bytes)}"
    if audit.planned_bytes is not None:
        figures += f" (planned {bytes_text(audit.planned_bytes)})"
    if audit.uncounted:
        figures += f"; uncounted: {', '.join(audit.uncounted)}"
    return figures


def _sentence(finding: Finding) -> str:
    price = f" ({flops_text(finding.flops)})" if finding.flops else ""
    return f"{finding.text}{price}."
