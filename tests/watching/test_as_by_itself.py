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


CLOSED = """
with open("log.txt", "w") as sys.stdout:
    print("logged")
"""

REPLACED = """
class Loud:
    def write(self, text): stream.write(text.upper())
    def flush(self): stream.flush()

stream, sys.stderr = sys.stderr, Loud()
"""


@pytest.mark.parametrize("end", [CLOSED, REPLACED, "sys.stdout = sys.stderr = None\n"], ids=["closed", "own", "none"])
def test_the_report_does_not_depend_on_the_streams_that_it_leaves(tmp_path: Path, end: str) -> None:
    write(tmp_path, TRAINS + end)
    done = watch("train.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "WASTE unowned-grad" in done.stderr


def test_without_any_stderr_there_are_still_the_data_and_the_exit_code(tmp_path: Path) -> None:
    write(tmp_path, TRAINS + "sys.stderr.close()\nsys.exit('the end')\n")
    done = watch("--json", "data.json", "train.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    assert "unowned-grad" in (tmp_path / "data.json").read_text()


def test_the_data_go_where_the_command_was_given(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path, TRAINS + "os.chdir('elsewhere')\n")
    assert watch("--json", "data.json", "train.py", cwd=tmp_path).returncode == 0
    assert (tmp_path / "data.json").exists()


def test_what_runs_at_exit_finds_the_script_as_main(tmp_path: Path) -> None:
    source = """
    import atexit, pickle, sys

    class Own:
        pass

    def at_exit():
        import helper
        print(sys.argv, helper.VALUE, type(pickle.loads(pickle.dumps(Own()))))

    atexit.register(at_exit)
    """
    write(tmp_path, source)
    write(tmp_path, "VALUE = 7", "helper.py")
    assert watch("train.py", "x", cwd=tmp_path).stdout == run("train.py", "x", cwd=tmp_path).stdout != ""


def test_it_is_said_that_numbers_of_threads_came_too_late(tmp_path: Path) -> None:
    write(tmp_path, "import os\nos.environ['OMP_NUM_THREADS'] = '77'\n")
    done = watch("train.py", cwd=tmp_path)
    assert "the script set OMP_NUM_THREADS=77 too late" in " ".join(done.stderr.split())
