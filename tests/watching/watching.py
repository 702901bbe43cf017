"""Running a script's text under watch, and beside it without."""

from __future__ import annotations

import runpy
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from frostline.watching.finding import Finding
from frostline.watching.script import Ended, Enough, Script
from frostline.watching.watch import Watch


def write(folder: Path, source: str, name: str = "train.py") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(source).lstrip())
    return path


def watched(path: Path, *args: str, steps: int | None = None, ignore: Iterable[str] = ()) -> tuple[Watch, Ended]:
    """Run a script under watch, as the command does."""

    def stop(done: int) -> None:
        if steps is not None and done >= steps:
            raise Enough

    script = Script(str(path), list(args))
    seen = Watch(str(path), ignore, stop)
    with seen:
        ended = script.run(seen.close)
    return seen, ended


def found(seen: Watch) -> list[str]:
    return [finding.rule for finding in seen.findings]


def only(seen: Watch, rule: str) -> Finding:
    (finding,) = [finding for finding in seen.findings if finding.rule == rule]
    return finding


def plainly(path: Path, *args: str) -> dict[str, Any]:
    """Run a script as Python does, and return its variables."""
    before = sys.argv
    sys.argv = [str(path), *args]
    try:
        return runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = before


def mended(path: Path, finding: Finding, after: str = "") -> Path:
    """The script with the finding's fix put where the report says, indented as that line; ``after`` at the end."""
    assert finding.fix.line, f"no line is known for the fix of {finding.rule}"
    lines = path.read_text().splitlines()
    at = finding.fix.line - 1
    if finding.fix.replaces:
        assert finding.fix.replaces in lines[at]
        lines[at] = lines[at].replace(finding.fix.replaces, finding.fix.code)
        return write(path.parent, "\n".join(lines) + "\n", "mended.py")
    indent = lines[at][: len(lines[at]) - len(lines[at].lstrip())]
    lines += [after] if after else []
    lines[at:at] = textwrap.indent(finding.fix.code, indent).splitlines()
    return write(path.parent, "\n".join(lines) + "\n", "mended.py")


__all__ = ["found", "mended", "only", "plainly", "pytest", "watched", "write"]
