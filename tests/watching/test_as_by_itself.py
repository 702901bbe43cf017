"""What a watched script sees of itself and of its process is what it would see by itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.watching.watching import write

import frostline as fl
from frostline.watching.script import Script

TRAINS = """
import os, sys
import torch
from torch import nn

torch.manual_seed(1)
model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
for _ in range(3):
    optimizer.zero_grad()
    model(torch.randn(2, 4)).pow(2).mean().backward()
    optimizer.step()
"""


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, timeout=120)


def watch(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run("-m", "frostline", "watch", *arguments, cwd=cwd)


def test_its_own_names_are_those_that_python_gives(tmp_path: Path) -> None:
    source = """
    import sys
    print(__file__, __name__, __loader__.name, __loader__.path, __cached__, __package__, __spec__, sys.argv, sys.path)
    """
    write(tmp_path, source)
    (tmp_path / "link.py").symlink_to(tmp_path / "train.py")
    for name in ("train.py", "link.py"):
        assert watch(name, cwd=tmp_path).stdout == run(name, cwd=tmp_path).stdout


def test_its_file_is_found_after_it_went_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path, TRAINS.replace("torch.manual_seed(1)", "os.chdir('elsewhere')"))
    monkeypatch.chdir(tmp_path)
    script = Script("train.py", [])
    with fl.watch() as seen:
        ended = script.run(lambda: None)
    (finding,) = seen.findings
    assert (ended.how, finding.place, finding.fix.line) == ("end", f"{tmp_path}/train.py:7", 7)
