"""Pages of memory that a process takes from the system, and what that takes.

Memory that is freed may go back to the system and is then taken anew, page by page. glibc does so with every block of
more than 32 MiB and with what is free at the top of its heap (``mallopt(3)``: M_MMAP_THRESHOLD, M_TRIM_THRESHOLD).
"""

from __future__ import annotations

import functools
import mmap
import os
import statistics
import time

import numpy as np

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

KEEPING = "MALLOC_TRIM_THRESHOLD_=1000000000000 MALLOC_MMAP_MAX_=0"
"""The environment in which glibc keeps what it has."""
_SETTINGS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "DYLD_INSERT_LIBRARIES")
_FRESH_BYTES = 1 << 22
_GOES = 5


def allocator_settings() -> list[tuple[str, str]]:
    """What the environment says of how memory is kept, or by which library."""
    return sorted(item for item in os.environ.items() if item[0].startswith(_SETTINGS))


def page_faults() -> int:
    """How many pages this process has taken so far; 0 where the system does not say."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@functools.cache
def seconds_per_fault() -> float:
    """The median of a few goes, so that one disturbed by others does not count."""
    return statistics.median(_seconds_per_fault() for _ in range(_GOES))


def _seconds_per_fault() -> float:
    """Of the first writing to memory that the system has just given, over that of the second."""
    with mmap.mmap(-1, _FRESH_BYTES) as fresh:
        pages = np.frombuffer(fresh, dtype=np.uint8)[:: mmap.PAGESIZE]
        before = page_faults()
        clocks = [time.perf_counter()]
        for _ in range(2):
            pages[:] = 1
            clocks.append(time.perf_counter())
        taken = page_faults() - before
        del pages  # the mapping cannot be closed under it
    start, first, second = clocks
    return max(0.0, (first - start) - (second - first)) / max(1, taken)
