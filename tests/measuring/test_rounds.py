"""Worker processes: what they answer, what one that fails does to the others, and that none is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.measuring.networks import FILE

from frostline.measuring import rounds
from frostline.measuring.case import Case, Source
from frostline.measuring.host import Worker, WorkerError
from frostline.measuring.rounds import measure_cases
from frostline.probing.timings import Reference

EVERYTHING = Case(("0.weight", "2.weight"), "freeze", "sgd")
RAISES = Case(("0.weight",), "freeze", "sgd")
DIES = Case(("2.weight",), "freeze", "sgd")
MOODY = Source(f"{FILE}:moody")


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The process numbers of every worker that is started."""
    started: list[int] = []

    class Noted(Worker):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            started.append(self.process_id)

    monkeypatch.setattr(rounds, "Worker", Noted)
    return started


def is_running(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process_id}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def assert_gone(*processes: int) -> None:
    """They are gone, or will be within ten seconds."""
    deadline = time.monotonic() + 10
    while any(map(is_running, processes)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [process for process in processes if is_running(process)]


def test_assert_gone_sees_a_process_that_is_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(time, "monotonic", iter([0.0, 11.0]).__next__)
    with pytest.raises(AssertionError):
        assert_gone(os.getpid())


class Looks(Reference):
    """A reference that takes what it is told."""

    def __init__(self, device: torch.device, taken: Iterator[float]) -> None:
        super().__init__(device)
        self.taken = taken

    def look(self, *, always: bool = False) -> float:
        return next(self.taken)


def test_a_case_that_raises_and_one_that_dies_leave_the_rest(
    workers: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("FROSTLINE_TEST_CHILD", str(tmp_path / "children"))
    looks = Looks(torch.device("cpu"), iter([0.5, 1.5, 4.0, 6.0, 2.0, 4.0]))
    fine, raised, died = measure_cases(MOODY, [EVERYTHING, RAISES, DIES], rounds=3, threads=1, reference=looks)
    assert fine.measured is not None
    assert len(fine.measured.turns) == 3
    assert min(fine.measured.turns) > 0
    assert fine.measured.reference_seconds == 3.0  # around the turns 1.0, 5.0 and 3.0
    assert fine.measured.peak_bytes == 6664  # tests/measuring/test_step_memory.py has it on paper
    assert fine.measured.backward_flops == 2 * 8 * (2 * 32 * 4 + 16 * 32)
    assert raised.measured is None
    assert raised.error == "LookupError: a key is gone"
    assert "in forward" in raised.detail
    assert died.measured is None
    assert "killed (signal 9)" in died.error
    assert len(workers) == 3
    children = [int(line) for line in (tmp_path / "children").read_text().split()]
    assert len(children) == 3
    assert_gone(*workers, *children)


def test_one_process_hosts_many_cases_and_another_takes_over_when_it_dies(workers: list[int]):
    cases = [EVERYTHING, DIES, RAISES, Case(("2.weight",), "optimizer-only", "sgd")]
    fine, died, raised, rest = measure_cases(MOODY, cases, rounds=2, threads=1, together=True)
    assert "killed (signal 9)" in died.error
    assert raised.error == "LookupError: a key is gone"
    assert fine.measured is not None
    assert rest.measured is not None
    assert (fine.measured.peak_bytes, rest.measured.peak_bytes) == (6664, 6664 + 2048)
    assert rest.measured.baseline_bytes["gradients"] == 2048
    assert len(workers) == 2
    assert_gone(*workers)


def test_ctrl_c_leaves_no_process(workers: list[int]):
    def stop(what: str, done: int, total: int) -> None:
        if what == "running":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_cases(Source(f"{FILE}:target"), [EVERYTHING], rounds=2, threads=1, progress=stop)
    assert len(workers) == 1
    assert_gone(*workers)


def test_a_worker_goes_with_the_process_that_started_it():
    script = (
        "import sys, time\n"
        "from frostline.measuring.case import Source\n"
        "from frostline.measuring.host import Worker\n"
        f"worker = Worker(Source({FILE + ':target'!r}), 1)\n"
        "worker.receive()\n"
        "print(worker.process_id, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, encoding="utf-8") as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert is_running(worker)
        parent.send_signal(signal.SIGKILL)
    assert_gone(worker)


def test_prints_of_the_users_code_do_not_reach_the_protocol():
    with Worker(Source(f"{FILE}:talkative"), 1) as worker:
        assert worker.receive()["threads"] == 1
        assert worker.ask("arrange", case=EVERYTHING.to_dict(), warm_up=2)["step_seconds"] > 0


def test_a_target_that_cannot_be_loaded_is_tried_once(workers: list[int]):
    one, two = measure_cases(Source(f"{FILE}:cannot_load"), [EVERYTHING, DIES], rounds=2, together=True)
    assert one.error == two.error
    assert one.error.startswith("LookupError: the weights are gone")
    assert len(workers) == 1


def test_what_was_asked_of_a_dead_worker_is_said_to_be_its_death():
    worker = Worker(Source(f"{FILE}:target"), 1)
    try:
        os.kill(worker.process_id, signal.SIGTERM)
        with pytest.raises(WorkerError, match="died of SIGTERM"):
            worker.receive()
    finally:
        worker.stop()
