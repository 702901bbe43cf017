"""How wide a report is, and what is said on a terminal while something takes long."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

WIDEST = 120


def report_width(console: Any) -> int:
    """Columns of a report: the terminal's; for a file or a pipe $COLUMNS, or 100."""
    if console.is_terminal:
        return min(int(console.width), WIDEST)
    asked = os.environ.get("COLUMNS", "")
    return min(int(asked) if asked.isdigit() and int(asked) > 0 else 100, WIDEST)


@contextmanager
def saying(what: str) -> Iterator[None]:
    """Say on a terminal's stderr what takes so long."""
    from rich.console import Console

    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield


@contextmanager
def progress(what: str) -> Iterator[Any]:
    """A bar on a terminal's stderr; called with how much is done, of how much, and if it changes, what."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(file=sys.stderr)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)

        def advance(done: int, total: int, now: str = what) -> None:
            bar.update(task, completed=done, total=total or None, description=now)

        yield advance


@contextmanager
def clean_stdout() -> Iterator[None]:
    """What C libraries print goes to stderr: HiGHS has lines of its own at times, and a program may read the report."""
    _flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        _flush()
        os.dup2(kept, 1)
        os.close(kept)


def _flush() -> None:
    """Write out what Python and the C library hold back: a pipe or a file gets it when the process ends."""
    sys.stdout.flush()
    ctypes.CDLL("ucrtbase" if os.name == "nt" else None).fflush(None)
