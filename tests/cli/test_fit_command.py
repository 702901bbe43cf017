"""``frostline fit`` from the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from frostline.cli import main
from frostline.reports.data import schema

FILE = f"{Path(__file__).parent / 'targets.py'}"


@pytest.fixture
def frost(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command in this process; exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["frostline", "fit", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


def test_json_has_each_row_with_what_holds_its_peak(frost: Any) -> None:
    code, out, err = frost(f"{FILE}:mlp", "--train", "head=2", "--train", "@all", "--memory", "100KiB", "--json")
    assert code == 0, err
    data = json.loads(out)
    jsonschema.Draft202012Validator(schema()).validate(data)
    assert data["memory_bytes"] == 100 * 1024
    assert data["batch"] == {"size": 8, "dimensions": {"input": [0]}, "given": False}
    assert data["length"] is None
    head, everything = data["rows"]
    assert (head["label"], everything["label"]) == ("head", "@all")
    for row in data["rows"]:
        found = row["batch"]
        assert found["peak_bytes"] == sum(found["peak"]["by_kind"].values()) <= 100 * 1024 < found["next_bytes"]
        assert found["cost"]["peak_bytes"] == found["peak_bytes"]
    assert head["batch"]["size"] > everything["batch"]["size"]
    assert {f["what"] for f in everything["batch"]["freezing"]} <= {"0", "2"}


def test_tokens_have_a_length_unless_it_is_not_asked_for(frost: Any) -> None:
    tokens = (f"{FILE}:tokens_model", "--input", "4x10", "--memory", "64KiB")
    code, out, err = frost(*tokens)
    assert code == 0, err
    assert "largest length" in out
    assert "dimension 1 of tokens (10 as found)" in " ".join(out.split())
    assert "largest length" not in frost(*tokens, "--batch-only")[1]


def test_scratch_says_so(frost: Any) -> None:
    code, out, err = frost(f"{FILE}:mlp", "--memory", "64KiB", "--scratch")
    assert code == 0, err
    assert "scratch inside kernels was measured" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{f}:mlp", "--memory", "64"], "--memory '64' cannot be read"),
        (["{f}:mlp", "--memory", "64G"], "Did you mean 64GiB?"),
        (["{f}:mlp", "--memory", "1KiB"], "nothing fits into 1.00 KiB: @now needs"),
        (["{f}:mlp", "--memory", "1MiB", "--batch-dim", "0"], "--batch-dim '0' cannot be read: write NAME=0"),
        (["{f}:mlp", "--memory", "1MiB", "--batch-dim", "y=0"], "there is no tensor 'y'; there is input[8, 16]"),
        (["{f}:mlp", "--memory", "1MiB", "--method", "frozen"], "no method 'frozen'"),
        (["{f}:mlp", "--memory", "1MiB", "--train", "nope"], "nope"),
        (["{f}:mlp", "--memory", "1MiB", "--loss", "mean"], "--loss 'mean' is not known"),
        (["{f}:no_loss", "--memory", "1MiB"], "--loss sum"),
    ],
)
def test_bad_input_is_one_message(frost: Any, arguments: list[str], message: str) -> None:
    code, out, err = frost(*[argument.replace("{f}", FILE) for argument in arguments])
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
