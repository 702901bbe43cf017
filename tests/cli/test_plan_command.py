"""``frostline plan`` from the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from frostline.cli import main
from frostline.reports.data import schema

FILE = f"{Path(__file__).parent / 'targets.py'}"
SIZE = ("--importance", "size")


@pytest.fixture
def frost(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command in this process; exit code, stdout, stderr."""

    def run(*arguments: str, command: str = "plan") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["frostline", command, *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


def valid(text: str) -> Any:
    data = json.loads(text)
    jsonschema.Draft202012Validator(schema()).validate(data)
    return data


def test_json_is_the_plan_that_save_writes_and_other_commands_read(frost: Any, tmp_path: Path) -> None:
    file = str(tmp_path / "plan.json")
    asked = ("--budget", "step_flops=80%", "--budget", "peak_bytes=1MiB", "--save", file)
    code, out, err = frost(f"{FILE}:mlp", *SIZE, *asked, "--json")
    assert code == 0, err
    data = valid(out)
    assert data == json.loads(Path(file).read_text())
    assert {b["figure"]: b["asked"] for b in data["budgets"]} == {"step_flops": "80%", "peak_bytes": "1MiB"}
    assert all(b["spent"] <= b["limit"] for b in data["budgets"])
    assert data["importance"]["source"] == "size: the number of elements"
    assert data["importance"]["scores"]["0.weight"] == 16 * 32
    code, out, err = frost(f"{FILE}:mlp", "--train", f"mine={file}", "--json", command="cost")
    assert code == 0, err
    row = valid(out)["rows"][0]
    assert (row["label"], row["subset"]["names"]) == ("mine", data["names"])
    assert row["step_flops"] == data["budgets"][0]["spent"]
    code, _, err = frost(f"{FILE}:wide_mlp", "--train", file, command="cost")
    assert code == 2
    assert "the plan is for another model than this one: it has 0.weight [64, 16] instead of [32, 16]" in err


def test_importance_is_measured_on_what_the_target_gives(frost: Any) -> None:
    asked = ("--budget", "trainable_parameters=10", "--json")
    code, out, err = frost(f"{FILE}:mlp", "--importance", "gradient_norm", *asked)
    assert code == 0, err
    data = valid(out)
    assert data["importance"]["source"] == "gradient_norm, of one batch: what TARGET gives"
    assert data["importance"]["scores"]["2.bias"] == 8 * 4**0.5  # the loss is the sum of 8 rows of 4
    assert data["names"] == ["2.bias"]


@pytest.mark.parametrize("wrapped", [False, True])
def test_importance_comes_from_a_file(frost: Any, tmp_path: Path, wrapped: bool) -> None:
    scores = {"0.weight": 0.0, "0.bias": 0.0, "2.weight": 0.0, "2.bias": 3.0}
    file = tmp_path / "scores.json"
    file.write_text(json.dumps({"scores": scores} if wrapped else scores))
    asked = ("--importance", str(file), "--budget", "trainable_parameters=10")
    code, out, err = frost(f"{FILE}:mlp", *asked)
    assert code == 0, err
    text = " ".join(out.split())
    assert "train 1 tensor, 0.59 % of the parameters: 2.bias" in text
    assert "importance: scores.json" in text
    assert "importance won: 3 of 3 (100 %); proven" in text


def test_layers_always_never_and_the_method(frost: Any) -> None:
    asked = ("--by", "layer", "--always", "2.bias", "--never", "0.bias", "--method", "train-only")
    code, out, err = frost(f"{FILE}:mlp", *SIZE, "--budget", "saved_bytes=100%", *asked, "--json")
    assert code == 0, err
    data = valid(out)
    assert data["names"] == ["0.weight", "2.weight", "2.bias"]
    assert (data["by"], data["method"], data["always"], data["never"]) == (
        "layer", "train-only", ["2.bias"], ["0.bias"],
    )  # fmt: skip


def test_a_frontier_is_a_table_a_plot_and_data(frost: Any, tmp_path: Path) -> None:
    plot = str(tmp_path / "frontier.png")
    asked = ("--frontier", "step_flops", "--points", "3", "--plot", plot)
    code, out, err = frost(f"{FILE}:mlp", *SIZE, *asked)
    assert code == 0, err
    assert "the knee:" in out
    assert Path(plot).read_bytes().startswith(b"\x89PNG")
    data = valid(frost(f"{FILE}:mlp", *SIZE, "--frontier", "step_flops", "--points", "3", "--json")[1])
    assert len(data["points"]) == 3
    assert data["points"][-1]["objective"] == data["points"][-1]["total"] == 676


def test_a_budget_of_seconds_times_the_ops_first(frost: Any) -> None:
    code, out, err = frost(f"{FILE}:mlp", *SIZE, "--budget", "step_seconds=90%")
    assert code == 0, err
    assert "step_seconds" in out
    assert "predicted" in out


def test_what_libraries_print_themselves_goes_to_stderr(tmp_path: Path) -> None:
    """HiGHS prints lines of its own at times, which no report for programs may hold; C holds them back in a pipe."""
    script = (
        "import ctypes, os, frostline.planning.program as p, frostline.cli as c\n"
        "real = p.milp\n"
        "def noisy(*a, **k):\n"
        "    os.write(1, b'a line of a library\\n')\n"
        "    ctypes.CDLL('ucrtbase' if os.name == 'nt' else None).printf(b'a line of C\\n')\n"
        "    return real(*a, **k)\n"
        "p.milp = noisy\n"
        "c.main()\n"
    )
    arguments = [f"{FILE}:mlp", *SIZE, "--budget", "step_flops=80%", "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(
        [sys.executable, "-c", script, "plan", *arguments], capture_output=True, text=True, check=True, env=environment
    )
    valid(done.stdout)
    assert "a line of a library" in done.stderr
    assert "a line of C" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["{f}:mlp", "--budget", "step_flops=50%"],
            "give --importance FILE.json (parameter name -> number) or size, tay",
        ),
        (["{f}:mlp", *SIZE], "give a --budget FIGURE=AMOUNT, such as step_flops=50%, or --frontier FIGURE"),
        (["{f}:mlp", *SIZE, "--budget", "step_flops"], "--budget 'step_flops' cannot be read: write FIGURE=AMOUNT"),
        (["{f}:mlp", *SIZE, "--budget", "step_flop=5"], "did you mean 'step_flops'?"),
        (["{f}:mlp", *SIZE, "--budget", "step_flops=1%"], "below the least possible"),
        (["{f}:mlp", *SIZE, *["--budget", "step_flops=1%"] * 2], "--budget step_flops is given twice"),
        (["{f}:mlp", *SIZE, "--budget", "peak_bytes=4G"], "Did you mean 4GiB?"),
        (["{f}:mlp", "--importance", "nope", "--budget", "step_flops=50%"], "'nope' is no file and no measure"),
        (["{f}:mlp", "--importance", "{f}", "--budget", "step_flops=50%"], "is no JSON"),
        (["{f}:mlp", *SIZE, "--budget", "step_flops=50%", "--plot", "x.png"], "--plot draws a frontier"),
        (["{f}:mlp", *SIZE, "--frontier", "step_flops", "--save", "x.json"], "--save writes one plan"),
        (["{f}:mlp", *SIZE, "--frontier", "flops"], "no budget is called 'flops'"),
        (["{f}:mlp", *SIZE, "--budget", "step_flops=50%", "--always", "nope"], "nope"),
        (["{f}:no_loss", *SIZE, "--budget", "step_flops=50%"], "--loss sum"),
    ],
)
def test_bad_input_is_one_message(frost: Any, arguments: list[str], message: str) -> None:
    code, out, err = frost(*[argument.replace("{f}", FILE) for argument in arguments])
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
