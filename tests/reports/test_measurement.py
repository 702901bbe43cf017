"""The report of a measurement, of figures made up so that every cell can be checked."""

from __future__ import annotations

from dataclasses import replace

import jsonschema
import torch
from torch import nn

import frostline as fl
from frostline.measuring.measured import Measured
from frostline.measuring.measurement import MeasuredRow
from frostline.reports.data import schema
from frostline.reports.measurement import measurement_text


def measured(seconds: float, peak: int, saved: int, interruptions: float = 3.0) -> Measured:
    """Three rounds around ``seconds``; half of each is backward."""
    turns = (seconds * 0.9, seconds, seconds * 1.1)
    part = tuple(turn / 4 for turn in turns)
    halves = tuple(turn / 2 for turn in turns)
    return Measured(turns, part, halves, part, interruptions, peak, 0, saved, 10240, 12288)


def measurement() -> fl.Measurement:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    trace = fl.trace(model, torch.randn(8, 16), loss=lambda out: out.sum())
    rows = (
        MeasuredRow("head by optimizer-only", trace.cost("2", "optimizer-only"), measured(0.016, 8192, 1536)),
        MeasuredRow("head by freeze", trace.cost("2"), measured(0.008, 4096, 2048)),
        MeasuredRow("norms", trace.cost("0.bias"), None, "RuntimeError: out of memory"),
        MeasuredRow("@all", trace.cost("@all"), measured(0.020, 16384, 1536)),
    )
    return fl.Measurement(rows, measured(0.021, 16384, 1536), 3, 2, trace, ("a note.",))


def test_predicted_stands_beside_measured():
    lines = measurement_text(measurement(), 120).splitlines()
    seconds = next(line for line in lines if line.startswith("head by optimizer-only")).split()
    assert seconds[3:] == ["-", "16.00", "0.80", "-", "-", "80.0", "4.00", "8.00", "4.00"]
    saved = [line.split() for line in lines if line.startswith("head by freeze")][1]
    assert saved[-3:] == ["1,024", "2,048", "-50.0"]  # bytes
    flops = [line.split() for line in lines if line.startswith("@all")][2]
    assert flops[1:4] == ["10.24", "10.24", "0"]


def test_the_founding_question_is_answered():
    text = " ".join(str(measurement()).split())
    assert (
        "head: leaving the rest out of the optimizer takes 80 % of full training's time, freezing it 40 %; of its peak "
        "memory 50 % and 25 %." in text
    )


def test_a_row_that_failed_is_named_and_noise_is_told():
    text = " ".join(str(measurement()).split())
    assert "norms could not be run: RuntimeError: out of memory" in text
    assert "half the distance of the quartiles of full training is 5.0 % of its median" in text
    assert "the medians of two processes that run it lie 4.9 % apart" in text
    assert "- a note." in text


def test_a_busy_machine_is_told():
    quiet = measurement()
    assert "busy" not in str(quiet)
    busy = replace(quiet, rows=(*quiet.rows[:-1], replace(quiet.full, measured=measured(0.02, 16384, 1536, 120.0))))
    text = " ".join(str(busy).split())
    assert "the machine was busy with something else: up to 120 times a second" in text
    assert "--threads 1 suffers least" in text
    assert "--threads" not in str(replace(busy, threads=1))


def test_a_narrow_report_has_more_tables_and_no_line_too_long():
    text = measurement_text(measurement(), 80)
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("\nhead by freeze ") > str(measurement()).count("\nhead by freeze ")


def test_its_data_is_valid():
    data = measurement().to_dict()
    jsonschema.Draft202012Validator(schema()).validate(data)
    assert [row["measured_ratio"] for row in data["rows"]] == [0.8, 0.4, None, 1.0]
    assert data["rows"][2]["error"] == "RuntimeError: out of memory"


def test_page_faults_are_told_where_they_take_time():
    assert "page faults" not in str(measurement())
    full = replace(measured(0.020, 16384, 1536), page_faults=1200.0, fault_seconds=0.002)
    rows = measurement().rows
    text = " ".join(str(replace(measurement(), rows=(*rows[:-1], replace(rows[-1], measured=full)))).split())
    assert "page faults: up to 10 % of a step (@all: 1,200, about 2.0 ms)" in text


def test_predicted_seconds_are_those_of_the_machine_as_fast_as_the_rows_had_it():
    """Every row ran beside a reference that took 1.25 times as long as when ops were timed."""
    plain = measurement()
    rows = [row if row.measured is None else replace(row, measured=at(row.measured, 0.005)) for row in plain.rows]
    slower = replace(plain, rows=tuple(rows), timed_at=0.004)
    assert plain.pace == 1
    assert slower.pace == 1.25
    assert slower.to_dict()["pace"] == 1.25
    assert "a reference kernel took 1.25 times as long" in " ".join(str(slower).split())
    assert "reference kernel" not in str(plain)


def at(found: Measured, reference_seconds: float) -> Measured:
    return replace(found, reference_seconds=reference_seconds)
