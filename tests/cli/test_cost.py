"""``frostline cost`` from the command line: rows, options, and what bad input gets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from tests.cli import targets

import frostline
from frostline.cli import main
from frostline.cli.rows import asked_rows, resolved
from frostline.reports.data import schema

HERE = Path(__file__).parent
FILE = f"{HERE / 'targets.py'}"


@pytest.fixture(autouse=True)
def unchanged_model() -> Any:
    """Whatever a command does, the model it was given keeps its parameters and flags."""
    before = {name: (p.detach().clone(), p.requires_grad, p.grad) for name, p in targets.MODEL.named_parameters()}
    yield
    for name, parameter in targets.MODEL.named_parameters():
        data, flag, grad = before[name]
        assert torch.equal(parameter, data)
        assert (parameter.requires_grad, parameter.grad) == (flag, grad)


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    """Run the command in this process; exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["frostline", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    return int(stopped.value.code or 0), out, err


@pytest.fixture
def frost(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda *arguments: run(capsys, monkeypatch, *arguments)


@pytest.fixture
def rows_of(frost: Any) -> Any:
    """The rows of ``--json``, by label."""

    def rows(*arguments: str) -> dict[str, Any]:
        code, out, err = frost("cost", *arguments, "--json")
        assert code == 0, err
        data = json.loads(out)
        jsonschema.Draft202012Validator(schema()).validate(data)
        return {row["label"]: row for row in data["rows"]}

    return rows


# -- what works ------------------------------------------------------------------------------------------------------


def test_without_train_the_built_in_rows_are_shown_each_once(rows_of: Any) -> None:
    assert list(rows_of(f"{FILE}:mlp")) == ["@head = @last:1", "@biases", "@now = @all"]


def test_the_command_gives_the_figures_of_the_api(rows_of: Any) -> None:
    row = rows_of(f"{FILE}:mlp", "--train", "2")["2"]
    model, inputs, loss = targets.mlp()
    cost = frostline.trace(model, inputs, loss).cost("2")
    assert {key: row[key] for key in ("step_flops", "saved_bytes", "optimizer_bytes")} == {
        "step_flops": cost.step_flops,
        "saved_bytes": cost.saved_bytes,
        "optimizer_bytes": cost.optimizer_bytes,
    }


def test_a_row_can_be_named(rows_of: Any) -> None:
    assert list(rows_of(f"{FILE}:mlp", "--train", "head=2", "--train", "0.weight,2.bias")) == [
        "head",
        "0.weight,2.bias",
    ]


def test_freeze_alone_takes_away_from_everything(rows_of: Any) -> None:
    (row,) = rows_of(f"{FILE}:mlp", "--freeze", "0").values()
    assert row["subset"]["names"] == ["2.weight", "2.bias"]


def test_freeze_takes_away_from_every_row(rows_of: Any) -> None:
    (row,) = rows_of(f"{FILE}:mlp", "--train", "2", "--freeze", "*.bias").values()
    assert row["subset"]["names"] == ["2.weight"]


def test_methods_make_rows(rows_of: Any) -> None:
    rows = rows_of(f"{FILE}:mlp", "--train", "2", "--method", "freeze", "--method", "backward-inputs")
    assert list(rows) == ["2 by freeze", "2 by backward-inputs"]
    assert rows["2 by freeze"]["saved_bytes"] < rows["2 by backward-inputs"]["saved_bytes"]


def test_the_optimizer_decides_what_is_kept(rows_of: Any) -> None:
    assert rows_of(f"{FILE}:mlp", "--train", "2", "--optimizer", "sgd")["2"]["optimizer_bytes"] == 0


def test_several_targets_share_one_table(rows_of: Any) -> None:
    rows = rows_of(f"{FILE}:mlp", f"{FILE}:wide_mlp", "--train", "2")
    assert [(label, row["model"]) for label, row in rows.items()] == [("mlp 2", 0), ("wide_mlp 2", 1)]


def test_a_pattern_need_only_match_in_one_of_several_targets(frost: Any) -> None:
    code, out, _ = frost("cost", f"{FILE}:mlp", f"{FILE}:cut", "--train", "2", "--train", "late")
    assert code == 0
    assert "no row 2: nothing in this Cut matches it" in out


def test_an_input_can_be_asked_for_by_position_name_and_dtype(frost: Any, rows_of: Any) -> None:
    named = rows_of(f"{FILE}:scalar_model", "--input", "x=8x16:float32", "--input", "scale=1", "--train", "@all")
    assert named["@all"]["forward_flops"] == 2 * 8 * 16 * 4
    for tokens in (
        rows_of(f"{FILE}:tokens_model", "--input", shape, "--train", "head") for shape in ("4x10", "4x10:int32")
    ):
        assert tokens["head"]["forward_flops"] == 2 * 40 * 8 * 2
    code, _, err = frost("cost", f"{FILE}:scalar_model", "--input", "x=8x16:float64", "--train", "@all")
    assert code == 2
    assert "must have the same dtype" in err


def test_a_module_can_be_named_in_place_of_a_file(rows_of: Any) -> None:
    assert "2" in rows_of("tests.cli.targets:mlp", "--train", "2")


def test_eval_is_asked_for(frost: Any) -> None:
    assert "train mode" in frost("cost", f"{FILE}:mlp", "--train", "2")[1]
    assert "eval mode" in frost("cost", f"{FILE}:mlp", "--train", "2", "--eval")[1]


def test_loss_sum_makes_figures_assumed(rows_of: Any) -> None:
    row = rows_of(f"{FILE}:no_loss", "--loss", "sum", "--train", "2")["2"]
    assert row["basis"]["step_flops"].startswith("assumed")


def test_every_extra_is_data_too(frost: Any) -> None:
    code, out, _ = frost(
        "cost", f"{FILE}:mlp", "--train", "2", "--sweep", "last", "--marginal", "--by", "parameter", "--json"
    )
    assert code == 0
    data = json.loads(out)
    jsonschema.Draft202012Validator(schema()).validate(data)
    assert [point["last"] for point in data["sweep"][0]["points"]] == [0, 1, 2]
    assert {row["name"] for row in data["breakdowns"][0]["rows"]} >= {"2.weight", "2.bias"}
    assert len(data["marginals"][0]["adding"]) == 2


def test_time_predicts_seconds_and_shows_what_is_in_memory_at_the_peak(frost: Any) -> None:
    asked = ("cost", f"{FILE}:mlp", "--train", "2", "--time")
    code, out, err = frost(*asked)
    assert code == 0, err
    head = next(line for line in out.splitlines() if line.split()[:1] == ["trains"])
    assert head.split().count("time") == 1
    assert "at the peak" in out
    assert "timed alone on cpu, 1 thread" in out
    data = json.loads(frost(*asked, "--json")[1])
    jsonschema.Draft202012Validator(schema()).validate(data)
    (row,) = data["rows"]
    assert row["step_seconds"] == pytest.approx(sum(row["seconds"]["by_part"].values()))
    assert row["seconds"]["low"] <= row["step_seconds"] <= row["seconds"]["high"]
    assert row["full"]["step_seconds"] is not None
    assert row["basis"]["step_seconds"] == "predicted"


def test_the_peak_is_there_without_timing_anything(frost: Any, rows_of: Any) -> None:
    row = rows_of(f"{FILE}:mlp", "--train", "2")["2"]
    assert row["peak_bytes"] == sum(row["peak"]["by_kind"].values())
    assert (row["step_seconds"], row["seconds"], row["basis"]["peak_bytes"]) == (None, None, "predicted")
    assert "at the peak" not in frost("cost", f"{FILE}:mlp", "--train", "2")[1]
    assert "at the peak" in frost("cost", f"{FILE}:mlp", "--train", "2", "--at-peak")[1]


def test_a_plot_is_written(frost: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    code, _, err = frost("cost", f"{FILE}:mlp", "--train", "2", "--plot", str(tmp_path / "memory.svg"))
    assert code == 0, err
    assert (tmp_path / "memory.svg").exists()
    code, _, err = frost("cost", f"{FILE}:mlp", "--sweep", "last", "--plot", str(tmp_path / "sweep.png"))
    assert code == 0, err
    assert (tmp_path / "sweep.png").exists()


def test_by_module_keeps_the_depth_asked_for(frost: Any) -> None:
    code, out, _ = frost("cost", f"{FILE}:mlp", "--train", "2", "--by", "module", "--depth", "1")
    assert code == 0
    assert "2 by module" in out


@pytest.mark.parametrize(("text", "labels"), [("@last:1 2 4", ["@last:1", "@last:2", "@last:4"]), ("a=x", ["a"])])
def test_one_option_can_make_several_rows(text: str, labels: list[str]) -> None:
    assert [row.label for row in asked_rows([text], [])] == labels


def test_subsets_that_are_the_same_become_one_row() -> None:
    subsets, _ = resolved(asked_rows(["2", "@head"], []), targets.MODEL)
    assert list(subsets) == ["2 = @head"]


def test_output_that_is_no_terminal_has_no_colour() -> None:
    command = [sys.executable, "-m", "frostline", "cost", f"{FILE}:mlp", "--train", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE.parents[1])
    assert "\x1b" not in done.stdout
    assert done.stderr == ""


def test_version_and_help(frost: Any) -> None:
    assert frost("--version")[1] == f"frostline {frostline.__version__}\n"
    code, out, _ = frost("cost", "--help")
    assert code == 0
    assert "frostline cost train.py:build --sweep last" in out


def test_importing_frostline_imports_no_reporting_library() -> None:
    code = "import sys, frostline; print([m for m in ('typer','rich','scipy','transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- what bad input gets ---------------------------------------------------------------------------------------------

BAD = {
    "a plot of another kind": (["{f}:mlp", "--plot", "memory.gif"], [".png or .svg, not 'memory.gif'"]),
    "a pattern that matches nothing": (["{f}:mlp", "--train", "2.wieght"], ["2.wieght", "2.weight"]),
    "a built-in that does not exist": (["{f}:mlp", "--train", "@tail"], ["@tail"]),
    "a subset that the loss does not reach": (["{f}:cut", "--train", "early"], ["does not reach", "early"]),
    "no loss": (["{f}:no_loss"], ["(8, 4), not a scalar loss", "--loss sum"]),
    "a loss that is no scalar": (["{f}:not_a_scalar"], ["must be a scalar, got shape (8,)"]),
    "a loss that needs no grad": (["{f}:needs_no_grad"], ["the loss needs no gradient"]),
    "inputs of the wrong shape": (["{f}:wrong_shape"], ["RuntimeError: mat1 and mat2", "in module '0' (Linear)"]),
    "integers asked to train": (["{f}:quantised", "--train", "packed"], ["packed", "int8", "cannot train"]),
    "a data-dependent model without weights": (["{f}:data_decides"], ["values decide", "weights"]),
    "an unknown optimizer": (["{f}:mlp", "--optimizer", "adamx"], ["adamx"]),
    "an optimizer without a fixed state": (["{f}:mlp", "--optimizer", "lbfgs"], ["LBFGS"]),
    "an unknown method": (["{f}:mlp", "--method", "thaw"], ["'thaw'", "freeze, optimizer-only"]),
    "an unknown device": (["{f}:mlp", "--device", "xpu"], ["'xpu' is not here"]),
    "a file that is missing": (["nowhere.py:mlp"], ["there is no file 'nowhere.py'"]),
    "a module that is missing": (["no.such.module:mlp"], ["there is no module 'no.such.module'"]),
    "a config that is missing": (["nowhere/config.json"], ["there is no file 'nowhere/config.json'"]),
    "a folder without a config": ([str(HERE)], ["holds no config.json"]),
    "a name that is missing": (["{f}:mpl"], ["has no 'mpl'", "Did you mean 'mlp'"]),
    "a script that trains nothing": (["{f}"], ["trains nothing", "It defines total, mlp"]),
    "a target that raises": (["{f}:raises"], ["LookupError: the weights are gone", "raised by TARGET"]),
    "a target that is no function": (["{f}:NUMBER"], ["is int", "must be a function"]),
    "a target that returns something else": (["{f}:a_number"], ["returned int", "(model, inputs, loss)"]),
    "a target that returns too much": (["{f}:four_things"], ["a tuple of 4", "(model, inputs, loss)"]),
    "a target that wants an argument": (["{f}:wants_an_argument"], ["without arguments", "'width'"]),
    "no inputs": (["{f}:only_model"], ["without inputs", "--input 8x128"]),
    "an input that cannot be read": (["{f}:only_model", "--input", "8by16"], ["'8by16' cannot be read"]),
    "an input of an unknown dtype": (["{f}:only_model", "--input", "8x16:int9"], ["no dtype 'int9'"]),
    "inputs of which one has a name": (["{f}:only_model", "--input", "8x16", "--input", "x=2"], ["or to none"]),
    "a model class for no config": (["{f}:mlp", "--model-class", "AutoModel"], ["--model-class is for a config"]),
    "a loss that is not known": (["{f}:mlp", "--loss", "mean"], ["'mean' is not known"]),
    "no target": ([], ["TARGET"]),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_gets_one_clear_message_and_exit_code_2(what: str, frost: Any) -> None:
    arguments, said = BAD[what]
    code, out, err = frost("cost", *(argument.replace("{f}", FILE) for argument in arguments))
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    for part in said:
        assert part in err


def test_debug_shows_the_traceback(frost: Any) -> None:
    code, _, err = frost("cost", f"{FILE}:raises", "--debug")
    assert code == 2
    assert "Traceback" in err
    assert "targets.py" in err


def test_a_file_that_breaks_while_loading_says_so(tmp_path: Path, frost: Any) -> None:
    (tmp_path / "broken.py").write_text("import no_such_library\n")
    code, _, err = frost("cost", f"{tmp_path / 'broken.py'}:model")
    assert code == 2
    assert "no_such_library" in err
    assert "while loading TARGET" in err
