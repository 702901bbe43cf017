"""Findings have seconds where all ops of the step were timed before, or where asked for; never by themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.watching.faults import FAULTS
from tests.watching.look_alikes import HEAD
from tests.watching.watching import only, watched, write

from frostline.probing.page_faults import seconds_per_fault
from frostline.probing.stopwatch import Stopwatch
from frostline.probing.timings import Reference
from frostline.reports.units import seconds_text
from frostline.watching.finding import Figures, Finding
from frostline.watching.script import Script
from frostline.watching.watch import Watch


def timed(path: Path) -> Watch:
    script, seen = Script(str(path), []), Watch(str(path), time=True)
    with seen:
        script.run(seen.close)
    return seen


def no_time(*_args: object, **_kwargs: object) -> None:
    raise AssertionError("something was timed")


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "cache"))
    return write(tmp_path, HEAD + FAULTS["the optimizer gets one layer"].source)


def seconds(finding: Finding) -> tuple[float | None, float | None]:
    assert finding.now is not None
    assert finding.fixed is not None
    return finding.now.step_seconds, finding.fixed.step_seconds


def test_nothing_is_timed_unasked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stopwatch, "time", no_time)
    monkeypatch.setattr(Stopwatch, "time_call", no_time)
    seen, _ = watched(path)
    assert seconds(only(seen, "unowned-grad")) == (None, None)
    assert not (path.parent / "cache").exists() or not list((path.parent / "cache").glob("timings*"))
    assert " predicted" not in str(seen)


def test_what_was_timed_before_gives_seconds_and_nothing_is_timed_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, fixed = seconds(only(timed(path), "unowned-grad"))
    assert now is not None
    assert fixed is not None
    assert 0 < fixed < now
    monkeypatch.setattr(Stopwatch, "time", no_time)
    monkeypatch.setattr(Stopwatch, "time_call", no_time)
    seen, _ = watched(path)
    again, again_fixed = seconds(only(seen, "unowned-grad"))
    assert again is not None
    assert again_fixed is not None
    assert 0 < again_fixed < again
    assert " predicted" in str(seen)
    assert " ± " in str(seen)


def test_the_error_is_the_costs_own_and_less_where_less_is_left(path: Path) -> None:
    seen = timed(path)
    assert seen.now is not None
    assert seen.now.seconds is not None
    now, stated = Figures.of(seen.now), seen.now.seconds.uncertainty
    assert now.seconds_error == stated > 0
    assert now.step_seconds is not None
    left = now.skipping(0, now.step_seconds / 4)
    assert left.seconds_error == pytest.approx(stated * 3 / 4, rel=1e-12)


@pytest.mark.parametrize("taken", [True, False], ids=["timed", "recalled"])
def test_steps_that_are_compared_are_of_a_machine_as_fast(
    taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This rule traces the step again, with the head untied: each trace once had a look of its own at the machine."""
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path, HEAD + FAULTS["a head alone, tied to the embedding"].source)
    if not taken:
        assert timed(path).findings
    asked: list[Reference] = []
    typical = Reference.typical

    def noted(self: Reference) -> float:
        asked.append(self)
        return typical(self)

    monkeypatch.setattr(Reference, "typical", noted)
    now, fixed = seconds(only(timed(path) if taken else watched(path)[0], "tied-surprise"))
    assert now is not None
    assert fixed is not None
    assert len(set(map(id, asked))) == 1


def test_page_faults_are_said_beside_what_is_predicted(path: Path) -> None:
    seen = timed(path)
    seen.record.pace.steps, seen.record.pace.page_faults = 10, 0
    assert "page faults" not in str(seen)
    seen.record.pace.page_faults = 1_000_000
    words = " ".join(str(seen).split())
    assert f"page faults took about {seconds_text(100_000 * seconds_per_fault())} of each step" in words
    assert seen.to_dict()["page_fault_seconds"] == 100_000 * seconds_per_fault()


def test_the_error_has_what_page_faults_took(path: Path) -> None:
    """Of every figure with seconds: the findings', the step's as it is, and the step's with all fixes."""
    seen = timed(path)
    seen.record.pace.steps, seen.record.pace.page_faults = 10, 100_000
    assert seen.now is not None
    assert seen.now.seconds is not None
    taken = seen.record.pace.fault_seconds
    assert taken > 0
    finding = only(seen, "unowned-grad")
    assert finding.now is not None
    stated = seen.now.seconds.uncertainty + taken
    assert finding.now.seconds_error == stated
    assert seen.to_dict()["now"]["seconds_error"] == stated
    assert seen.fixed is not None
    assert finding.fixed is not None
    assert seen.fixed.seconds_error == finding.fixed.seconds_error > taken


def test_seconds_of_what_is_kept_are_those_of_its_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the fix leaves out is the forward's own time but for the head's; the backward stays as it is."""
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "cache"))
    seen = timed(write(tmp_path, HEAD + FAULTS["a frozen body over the same samples"].source))
    now, fixed = seconds(only(seen, "cacheable-prefix"))
    assert now is not None
    assert fixed is not None
    assert seen.now is not None
    parts = seen.now.seconds
    assert parts is not None
    assert 0 < now - fixed < parts.forward + parts.overhead
    assert seen.fixed is not None
    assert seen.fixed.step_seconds == fixed
