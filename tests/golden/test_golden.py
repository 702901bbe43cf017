"""Whole reports, compared to the letter; read the files beside this one to see what a user sees."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from frostline.cli import app

MODELS = Path(__file__).parent / "models.py"
REPORTS = {
    "cost_mlp": (100, ["cost", "{m}:mlp"]),
    "cost_encoder": (100, ["cost", "{m}:encoder"]),
    "cost_encoder_80": (80, ["cost", "{m}:encoder"]),
    "methods": (100, ["cost", "{m}:encoder", "--train", "@last:1", "--method", "freeze", "--method", "optimizer-only"]),
    "models": (100, ["cost", "{m}:encoder", "{m}:encoder_with_adapter", "--train", "adapter", "--train", "@last:2"]),
    "sweep_last": (100, ["cost", "{m}:encoder", "--train", "@head", "--sweep", "last"]),
    "marginal": (100, ["cost", "{m}:encoder", "--train", "early=embed_norm,@last:1", "--marginal"]),
    "by_module": (100, ["cost", "{m}:encoder", "--train", "@last:2", "--by", "module"]),
    "by_op": (80, ["cost", "{m}:encoder", "--train", "@norms", "--by", "op"]),
    "by_parameter": (80, ["cost", "{m}:encoder", "--train", "@last:1", "--by", "parameter"]),
    "at_peak": (80, ["cost", "{m}:encoder", "--train", "@head", "--train", "@last:2", "--at-peak"]),
    "fit": (100, ["fit", "{m}:encoder", "--train", "@last:2", "--memory", "64MiB"]),
    "fit_80": (80, ["fit", "{m}:mlp", "--memory", "1MiB", "--batch-dim", "input=0"]),
    "slice": (100, ["cost", "{m}:encoder", "--train", "embed.weight[900:]"]),
}


def report(width: int, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    result = CliRunner().invoke(app, [argument.replace("{m}", str(MODELS)) for argument in arguments])
    assert result.exception is None, result.output
    return re.sub(r"\btorch \d[\w.]*", "torch *", result.output)


@pytest.mark.parametrize("name", REPORTS)
def test_the_report_is_as_kept(name: str, golden: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    width, arguments = REPORTS[name]
    text = report(width, arguments, monkeypatch)
    assert max(map(len, text.splitlines())) <= width
    golden(name, text)


def test_every_kept_report_is_still_made() -> None:
    assert {path.stem for path in Path(__file__).parent.glob("*.txt")} == set(REPORTS)


@pytest.mark.parametrize("name", ["by_module", "by_op", "by_parameter"])
def test_printed_rows_add_up_to_the_printed_total(name: str) -> None:
    lines = (Path(__file__).parent / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if re.search(r" by (module|op|parameter) ", line))
    table = lines[start + 2 :]
    *rows, total = [re.findall(r"<?\d[\d,]*(?:\.\d+)?(?=  |$)", _figures(line)) for line in table]
    for column, whole in enumerate(total):
        parts = [_number(row[column]) for row in rows]
        slack = 0.011 * len(parts) if column != 2 else 0.11 * len(parts)  # each is rounded
        assert abs(sum(parts) - _number(whole)) <= slack


def _figures(line: str) -> str:
    """A row without its name."""
    return re.split(r" {2,}", line, maxsplit=1)[1]


def _number(text: str) -> float:
    return 0.0 if text.startswith("<") else float(text.replace(",", ""))
