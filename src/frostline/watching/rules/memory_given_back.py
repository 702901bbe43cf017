"""``memory-given-back``: the C library gives freed memory back to the system, and each step takes it anew."""

from __future__ import annotations

import mmap
import platform
from collections.abc import Iterator

from frostline.probing.page_faults import KEEPING, allocator_settings, seconds_per_fault
from frostline.watching.finding import Finding, Fix, Level
from frostline.watching.record import Record
from frostline.watching.rules import Rule
from frostline.watching.steps import Steps

ID = "memory-given-back"
STEPS = 5
"""Fewer say nothing yet."""
BYTES = 8 << 20
"""Taken in a step, at least."""
WORTH = 0.05
"""Of the time, at least."""
FINE = "the pages are those of a data file that is mapped, or of new data that is kept."


def find(record: Record, steps: Steps) -> Iterator[Finding]:
    """Page faults that take a part of the steps' time, where glibc is not told to keep what it has."""
    pace = record.pace
    if pace.steps < STEPS or platform.libc_ver()[0] != "glibc" or allocator_settings():
        return
    faults = pace.page_faults / pace.steps
    seconds = pace.fault_seconds
    if faults * mmap.PAGESIZE >= BYTES and seconds >= WORTH * pace.seconds / pace.steps:
        yield _finding(faults, seconds, pace.seconds / pace.steps)


def _finding(faults: float, seconds: float, step_seconds: float) -> Finding:
    return Finding(
        rule=ID,
        level=Level.INFO,
        text=f"each step takes {faults * mmap.PAGESIZE / 2**20:,.0f} MiB of memory from the system page by page, about "
        f"{seconds / step_seconds:.0%} of its time: what the step before freed was given back.",
        place="",
        parameters=(),
        modules=(),
        evidence=(
            f"{faults:,.0f} page faults a step, at {1e6 * seconds_per_fault():.2g} us about {1e3 * seconds:.3g} ms of "
            f"{1e3 * step_seconds:.3g}",
        ),
        fix=Fix(f"{KEEPING} python ...", "start the script so: glibc then keeps what it has"),
        fine=FINE,
    )


RULE = Rule(ID, Level.INFO, find)
