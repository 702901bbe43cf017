"""``frostline measure`` from the command line."""

from __future__ import annotations

import json
import sys
from typing import Any

import jsonschema
import pytest
from tests.measuring.networks import FILE

from frostline.cli import main
from frostline.reports.data import schema


@pytest.fixture
def frost(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command in this process; exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["frostline", "measure", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


def test_json_has_each_row_predicted_and_measured(frost: Any):
    code, out, err = frost(
        f"{FILE}:target", "--train", "head=2", "--method", "freeze", "--optimizer", "sgd",
        "--repeats", "2", "--threads", "1", "--no-predict", "--json",
    )  # fmt: skip
    assert code == 0, err
    data = json.loads(out)
    jsonschema.Draft202012Validator(schema()).validate(data)
    assert [row["label"] for row in data["rows"]] == ["head", "@all"]
    assert [len(row["measured"]["round_seconds"]) for row in data["rows"]] == [2, 2]
    assert data["rows"][1]["measured"]["peak_bytes"] == 6664
    assert data["rows"][0]["measured"]["saved_bytes"] == data["rows"][0]["predicted"]["saved_bytes"]
    assert data["model"]["modes"] == "train mode"


def test_a_row_that_raises_is_named_and_the_table_has_the_others(frost: Any):
    code, out, err = frost(
        f"{FILE}:moody", "--train", "0", "--method", "freeze", "--optimizer", "sgd",
        "--repeats", "2", "--threads", "1", "--no-predict", "--eval",
    )  # fmt: skip
    assert code == 0, err
    assert "eval mode" in out
    assert "- 0 could not be run: LookupError: a key is gone" in out
    # (On a busy machine a row of the seconds may say so in lines of its own.)
    rows = [line.split() for line in out.splitlines() if line.startswith("@all")]
    assert any(row[6:7] == ["100"] for row in rows)  # % of full training
    assert any(row[2:3] == ["6,664"] for row in rows)  # bytes measured
    assert any(row[1:4] == ["10.24", "10.24", "0"] for row in rows)


def test_bad_input_is_one_message(frost: Any):
    assert frost(f"{FILE}:nothing")[0] == 2
    code, _, err = frost(f"{FILE}:target", "--train", "2", "--method", "frozen")
    assert code == 2
    assert "no method 'frozen'" in err
    code, _, err = frost(f"{FILE}:target", "--train", "nope")
    assert code == 2
    assert "nope" in err
    assert "--loss" in frost(f"{FILE}:target", "--loss", "mean")[2]
