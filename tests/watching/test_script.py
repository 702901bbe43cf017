"""A watched script runs as it would by itself: output, arguments, exit code, errors, random numbers, weights."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from tests.watching.watching import found, plainly, watched, write

import frostline as fl
from frostline.errors import FrostlineError, TargetError
from frostline.watching.script import Script

TRAINS = """
import sys
import torch
from torch import nn

torch.manual_seed(1)
model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 2))
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(4):
    optimizer.zero_grad()
    model(torch.randn(4, 6)).pow(2).mean().backward()
    optimizer.step()
drawn = torch.rand(3)
"""


def command(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "frostline", "watch", *arguments], capture_output=True, text=True, cwd=cwd, timeout=120
    )


def test_weights_and_random_numbers_are_those_of_an_unwatched_run(tmp_path: Path) -> None:
    path = write(tmp_path, TRAINS)
    plain = plainly(path)
    script = Script(str(path), [])
    with fl.watch():
        script.run(lambda: None)
    ours = script._main.__dict__
    assert torch.equal(ours["drawn"], plain["drawn"])
    for name, value in plain["model"].state_dict().items():
        assert torch.equal(ours["model"].state_dict()[name], value), name


def test_nothing_of_ours_is_left_behind() -> None:
    from torch.nn.modules import module
    from torch.optim import optimizer

    before = torch.optim.Optimizer.__init__, torch.autograd._engine_run_backward
    model = torch.nn.Linear(2, 2)

    def fail() -> None:
        with fl.watch():
            model(torch.randn(1, 2)).sum()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (torch.optim.Optimizer.__init__, torch.autograd._engine_run_backward) == before
    assert not module._has_any_global_hook()
    assert not optimizer._global_optimizer_pre_hooks
    assert not optimizer._global_optimizer_post_hooks
    assert torch._C._len_torch_function_stack() == 0
    assert not model.weight._backward_hooks


def test_output_arguments_and_exit_code_are_the_scripts(tmp_path: Path) -> None:
    source = """
    import sys, os
    print(__name__, sys.argv[1:], os.path.basename(sys.argv[0]), os.path.basename(__file__))
    import helper
    print(helper.VALUE)
    print("to stderr", file=sys.stderr)
    sys.exit(3)
    """
    write(tmp_path, "VALUE = 7", "helper.py")
    path = write(tmp_path, source)
    done = command(str(path), "--steps", "5", "-x")
    assert done.returncode == 3
    assert done.stdout == "__main__ ['--steps', '5', '-x'] train.py train.py\n7\n"
    assert done.stderr.startswith("to stderr\n")
    assert "nothing was trained" in done.stderr


def test_an_error_is_shown_as_python_shows_it_and_then_the_findings(tmp_path: Path) -> None:
    source = TRAINS.replace("model.parameters()", "model[3].parameters()") + "\n\ndef f():\n    return 1 / 0\n\n\nf()\n"
    path = write(tmp_path, source)
    done = command(str(path))
    plain = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == plain.returncode == 1
    assert done.stderr.startswith(plain.stderr)
    assert "WASTE unowned-grad" in done.stderr


def test_ctrl_c_ends_with_the_findings_so_far(tmp_path: Path) -> None:
    source = TRAINS.replace("model.parameters()", "model[3].parameters()") + "\nraise KeyboardInterrupt\n"
    seen, ended = watched(write(tmp_path, source))
    assert (ended.code, ended.how, found(seen)) == (130, "interrupt", ["unowned-grad"])


def test_steps_ends_the_script(tmp_path: Path) -> None:
    source = TRAINS.replace("range(4)", "iter(int, 1)") + "\nprint('never')\n"
    seen, ended = watched(write(tmp_path, source), steps=3)
    assert (ended.code, ended.how, seen.record.num_steps) == (0, "enough", 3)


def test_strict_is_1_if_something_is_found_and_0_if_not(tmp_path: Path) -> None:
    fine = write(tmp_path, TRAINS)
    wasteful = write(tmp_path, TRAINS.replace("model.parameters()", "model[3].parameters()"), "wasteful.py")
    assert command("--strict", str(fine)).returncode == 0
    assert command("--strict", str(wasteful)).returncode == 1
    assert command("--strict", "--ignore", "unowned-grad", str(wasteful)).returncode == 0
    assert command(str(wasteful)).returncode == 0


def test_a_module_runs_as_with_python_dash_m(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    write(package, "", "__init__.py")
    write(package, "VALUE = 5", "values.py")
    write(package, "import sys\nfrom .values import VALUE\nprint(__name__, __package__, VALUE, sys.argv[1:])", "run.py")
    done = command("-m", "package.run", "a", "--b", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "__main__ package 5 ['a', '--b']\n"), done.stderr


def test_what_is_not_there_is_said() -> None:
    done = command("no_such_file.py")
    assert done.returncode == 2
    assert "there is no file 'no_such_file.py'" in done.stderr
    with pytest.raises(TargetError, match="there is no module"):
        Script("no.such.module", [], module=True)
    with pytest.raises(FrostlineError, match="there is no rule 'no-such'"):
        fl.watch(ignore=["no-such"])


def test_training_in_a_thread_is_seen_and_waited_for(tmp_path: Path) -> None:
    body = textwrap.indent(TRAINS.replace("model.parameters()", "model[3].parameters()"), "    ")
    source = f"import threading\n\n\ndef train():\n{body}\n\nthreading.Thread(target=train).start()\n"
    seen, ended = watched(write(tmp_path, source))
    assert (ended.code, found(seen), seen.record.num_steps) == (0, ["unowned-grad"], 4)


def test_findings_are_not_known_before_the_end() -> None:
    with fl.watch() as seen:
        with pytest.raises(FrostlineError, match="when the block has ended"):
            _ = seen.findings
        assert "being watched" in str(seen)
    assert "nothing was trained" in str(seen)


def test_a_forked_child_reports_nothing_and_is_said(tmp_path: Path) -> None:
    end = "if not child:\n    os.wait()\nprint('child' if child else 'parent')\n"
    source = f"import os\n\nchild = os.fork() == 0\n{TRAINS}\n{end}"
    done = command(str(write(tmp_path, source)))
    assert (done.returncode, done.stdout) == (0, "child\nparent\n"), done.stderr
    assert len(re.findall(r"^watched\s", done.stderr, re.MULTILINE)) == 1
    assert "a process that the script forked trained too: what it did was not seen" in " ".join(done.stderr.split())


def test_spawned_processes_are_said_not_to_be_seen(tmp_path: Path) -> None:
    body = textwrap.indent(TRAINS, "    ")
    source = f"""
import torch

def train(rank):
{body}

if __name__ == "__main__":
    torch.multiprocessing.spawn(train, nprocs=2)
"""
    done = command(str(write(tmp_path, source)))
    assert done.returncode == 0, done.stderr
    assert "nothing was trained" in done.stderr
    assert "the script started 2 other processes" in done.stderr


def test_workers_of_a_loader_are_no_concern(tmp_path: Path) -> None:
    source = """
import torch
from torch.utils.data import DataLoader, TensorDataset

model = torch.nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for (x,) in DataLoader(TensorDataset(torch.randn(12, 4)), batch_size=4, num_workers=2):
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()
"""
    done = command(str(write(tmp_path, source)))
    assert done.returncode == 0, done.stderr
    assert "nothing found" in done.stderr
    assert "not seen" not in done.stderr


def test_an_exit_after_training_keeps_its_code_and_the_findings(tmp_path: Path) -> None:
    source = TRAINS.replace("model.parameters()", "model[3].parameters()") + "\nsys.exit(7)\n"
    seen, ended = watched(write(tmp_path, source))
    assert (ended.code, ended.how, found(seen)) == (7, "exit", ["unowned-grad"])


def test_a_signal_ends_with_the_findings_so_far(tmp_path: Path) -> None:
    source = TRAINS.replace("model.parameters()", "model[3].parameters()")
    source += (
        "\nimport os, signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)"  # (a job of a shell's)
    )
    source += "\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    done = command(str(write(tmp_path, source)))
    assert done.returncode == 130
    assert "KeyboardInterrupt" in done.stderr
    assert "WASTE unowned-grad" in done.stderr
