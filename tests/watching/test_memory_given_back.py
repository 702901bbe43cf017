"""A script whose steps take memory from the system anew."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest
from tests.watching.watching import found, only, watched, write

from frostline.watching.finding import Level

pytestmark = [
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the rule is about glibc"),
    pytest.mark.skipif(any(name.startswith("MALLOC_") for name in os.environ), reason="glibc is told to keep memory"),
]
BYTES = 24 << 20
SCRIPT = """
import mmap
import torch
from torch import nn

def load():
    with mmap.mmap(-1, {bytes}) as fresh:
        fresh.madvise(mmap.MADV_NOHUGEPAGE)
        fresh.write(b"1" * {bytes})

model = nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
{before}
for _ in range({steps}):
    {inside}
    optimizer.zero_grad()
    model(torch.ones(2, 4)).square().mean().backward()
    optimizer.step()
"""


def script(folder: Path, *, steps: int = 10, inside: str = "pass", before: str = "") -> Path:
    return write(folder, SCRIPT.format(bytes=BYTES, steps=steps, inside=inside, before=before))


def test_pages_taken_at_each_step_are_found_and_counted(tmp_path: Path) -> None:
    seen, ended = watched(script(tmp_path, inside="load()"))
    assert ended.code == 0
    finding = only(seen, "memory-given-back")
    assert finding.level == Level.INFO
    assert seen.record.pace.steps == 10 - 2  # the first two are inspected
    faults = seen.record.pace.page_faults / seen.record.pace.steps
    assert BYTES // 4096 <= faults < 3 * BYTES // 4096  # (Python's own copy may be taken anew as well)
    assert f"{faults:,.0f} page faults a step" in finding.evidence[0]
    assert "MALLOC_TRIM_THRESHOLD_" in finding.fix.code


@pytest.mark.parametrize(
    "fine", [{}, {"before": "load()"}, {"steps": 6, "inside": "load()"}], ids=["nothing", "loaded once", "few steps"]
)
def test_what_takes_no_memory_at_each_step_is_let_alone(fine: dict[str, str | int], tmp_path: Path) -> None:
    assert found(watched(script(tmp_path, **fine))[0]) == []  # type: ignore[arg-type]


def test_it_is_let_alone_where_the_allocator_is_told_what_to_keep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    assert found(watched(script(tmp_path, inside="load()"))[0]) == []
