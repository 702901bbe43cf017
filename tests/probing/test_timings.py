"""Timings kept between runs, per device, threads and torch; damaged, they are taken again; interrupted, they go on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cases import CASES
from tests.truth.comparing import trace_case

from frostline.probing import stopwatch, timings
from frostline.probing.stopwatch import Work
from frostline.probing.timings import Timings
from frostline.tracing.calls import TensorMeta

aten: Any = torch.ops.aten
CPU = torch.device("cpu")
A = TensorMeta((8, 8), (8, 1), torch.float32, "cpu")
WORK = Work(aten.mm.default, (A, A), {})


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path))
    monkeypatch.setattr(stopwatch, "ROTATED_BYTES", 1 << 16)
    monkeypatch.setattr(stopwatch, "MOST_SAMPLES", 1)
    return tmp_path


def test_a_second_process_times_nothing() -> None:
    first = Timings(CPU)
    first.get(WORK)
    second = Timings(CPU)
    found = second.get(WORK)
    assert (first.num_timed, second.num_timed) == (1, 0)
    assert found.seconds > 0


def test_a_timing_is_carried_to_the_speed_of_today(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Timings(CPU)
    kept.get(WORK)
    seconds, reference = kept._known[timings.key_of(WORK)].timing.seconds, kept._known[timings.key_of(WORK)].reference
    today = Timings(CPU)
    monkeypatch.setattr(today.reference, "_once", lambda: 3 * reference)  # the machine is three times slower now
    assert today.get(WORK).seconds == pytest.approx(3 * seconds)


@pytest.mark.parametrize("damage", [b"", b"no database", None, "no time"])
def test_a_damaged_store_is_taken_again(damage: Any, folder: Path) -> None:
    Timings(CPU).get(WORK)
    (path,) = folder.glob("timings-*.sqlite")
    if damage == "no time":
        import sqlite3

        with sqlite3.connect(path) as connection:
            connection.execute("UPDATE answers SET answer = '[{\"seconds\": -1}, 0]'")
        connection.close()
    else:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if damage is None else damage)
    again = Timings(CPU)
    assert again.get(WORK).seconds > 0
    assert again.num_timed == 1
    once_more = Timings(CPU)
    once_more.get(WORK)
    assert once_more.num_timed == 0


def test_timings_of_another_thread_count_are_not_used_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    Timings(CPU).get(WORK)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    other = Timings(CPU)
    other.get(WORK)
    assert other.num_timed == 1
    (said,) = other.others()
    assert said.startswith("cpu, ")
    assert "7" not in said.split(",")[1]


def test_timings_with_memory_kept_otherwise_are_not_used_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    Timings(CPU).get(WORK)
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000000000")
    other = Timings(CPU)
    other.get(WORK)
    assert other.num_timed == 1
    (said,) = other.others()
    assert "allocator" not in said
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    again = Timings(CPU)
    again.get(WORK)
    assert again.num_timed == 0
    (said,) = again.others()
    assert "allocator settings" in said


def test_timings_of_another_torch_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    Timings(CPU).get(WORK)
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    other = Timings(CPU)
    other.get(WORK)
    assert other.num_timed == 1
    assert any(torch.version.__version__ in said for said in other.others())


def test_an_interrupted_calibration_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = trace_case(CASES["mlp"]())

    def interrupt(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trace.calibrate(progress=interrupt)
    assert trace.calibration is None
    assert trace.cost("@all").step_seconds is None
    rest = trace_case(CASES["mlp"]()).calibrate()
    again = trace_case(CASES["mlp"]()).calibrate()
    monkeypatch.setenv("FROSTLINE_CACHE", "off")
    from_nothing = trace_case(CASES["mlp"]()).calibrate()
    assert rest.num_timed == from_nothing.num_timed - 5  # (the five that were done)
    assert again.num_timed == 0


def test_what_cannot_be_timed_is_named_beside_the_total(monkeypatch: pytest.MonkeyPatch) -> None:
    time = stopwatch.Stopwatch.time

    def refusing(self: Any, work: Work) -> Any:
        if work.op is aten.relu.default:
            return stopwatch.failed("RuntimeError: no memory")
        return time(self, work)

    monkeypatch.setattr(stopwatch.Stopwatch, "time", refusing)
    monkeypatch.setenv("FROSTLINE_CACHE", "off")
    trace = trace_case(CASES["unused_parameters"]())
    found = trace.calibrate()
    assert found.failed == {"aten.relu.default": "RuntimeError: no memory"}
    seconds = trace.cost("@all").seconds
    assert seconds is not None
    assert seconds.unknown == {"aten.relu.default": "RuntimeError: no memory"}
    assert seconds.total > 0


@pytest.mark.filterwarnings("ignore")
def test_a_backward_is_never_given_a_made_up_workspace() -> None:
    trace = trace_case(CASES["lstm_classifier"]())
    trace.entangled = "the test says so"
    found = trace.calibrate()
    assert found.failed == {
        "aten.mkldnn_rnn_layer_backward.default": "reads a workspace that only its forward can make"
    }
    assert trace.cost("@all").step_seconds is not None


def test_a_replay_that_fails_leaves_torchs_ops_to_be_timed_alone() -> None:
    """What they share with it, such as ``detach``, is in other rows as well."""

    def fails(_runner: Any) -> None:
        raise RuntimeError("one of them")

    own = Work(torch.ops.prims.mul.default, (A, A), {})  # (as little torch's as a user's)
    taken = Timings(CPU)
    taken.take_replays([WORK, own], fails)
    assert taken.get(WORK).seconds > 0
    assert not taken.get(WORK).failure
    assert taken.get(own).failure == "RuntimeError: one of them"
