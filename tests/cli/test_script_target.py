"""A training script as TARGET: its second step is costed, with no function to write."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.cases import Case, build, trainable_names
from tests.truth.reference import measure
from torch import nn

import frostline as fl
from frostline.cli import main
from frostline.cli.loading import check_parts, traced
from frostline.errors import TargetError
from frostline.targets import load

SCRIPTS = Path(__file__).parents[2] / "examples" / "scripts"


def write(folder: Path, source: str) -> str:
    path = folder / "train.py"
    path.write_text(textwrap.dedent(source))
    return str(path)


def founding() -> Case:
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 5))
    return Case(model, torch.randn(1, 10), lambda logits: F.cross_entropy(logits, torch.tensor([3])))


@pytest.mark.parametrize("name", ["middle_layer", "everything"])
def test_the_founding_scripts_cost_what_really_running_their_step_does(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["frostline", "cost", str(SCRIPTS / f"{name}.py"), "--json"])
    with pytest.raises(SystemExit) as stopped:
        main()
    out, err = capsys.readouterr()
    assert stopped.value.code == 0
    assert err == "loss 1.3442\n"  # (what the script prints is not among the data)
    rows = {row["label"]: row for row in json.loads(out)["rows"]}
    assert list(rows) == ["@head = @last:1", "@last:2", "@biases", "@now = @all"]
    case = build(founding)
    for row in rows.values():
        truth = measure(case, row["subset"]["names"])
        assert row["forward_flops"] == truth.forward_flops
        assert row["grad_input_flops"] == truth.grad_input_flops
        assert row["grad_weight_flops"] == truth.grad_weight_flops
        assert row["saved_bytes"] == truth.saved_bytes
    assert rows["@now = @all"]["subset"]["names"] == trainable_names(case.model)


def test_the_second_steps_batch_modes_and_flags_are_taken(tmp_path: Path) -> None:
    source = """
    import sys, torch
    from torch import nn
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.1), nn.Linear(8, 2))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=float(sys.argv[1]))
    for step in range(10):
        if step == 1:
            model[1].eval()
        optimizer.zero_grad()
        loss = model(torch.randn(4 + step, 6)).pow(2).mean() / 2
        loss.backward()
        optimizer.step()
        model.eval()
        assert step < 2
    """
    spec = f"{write(tmp_path, source)} 0.1"
    target = load(spec)
    trace = traced(spec, target, None, False)
    assert [training for _, training in trace.modes] == [False, False, False, False]
    assert trace.cost("@now").subset.names == ("2.weight", "2.bias")
    assert trace.cost("@now").grad_weight_flops == 2 * 5 * 8 * 2  # the second batch has five rows
    assert "step 2 of" in target.note


def test_several_models_are_one_and_only_cost_takes_them(tmp_path: Path) -> None:
    source = """
    import torch
    from torch import nn
    encoder, head = nn.Linear(6, 8), nn.Linear(8, 2)
    encoder.requires_grad_(False)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        head(encoder(torch.randn(4, 6)).relu()).sum().backward()
        optimizer.step()
    """
    spec = write(tmp_path, source)
    target = load(spec)
    trace = traced(spec, target, None, False)
    assert list(trace.parameters) == ["encoder.weight", "encoder.bias", "head.weight", "head.bias"]
    cost = trace.cost("@now")
    assert cost.forward_flops == 2 * 4 * (6 * 8 + 8 * 2)
    assert cost.backward_flops == 2 * 4 * 8 * 2
    with pytest.raises(TargetError, match="name a function that returns"):
        check_parts(spec, target)


def test_fit_and_measure_take_a_script(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(SCRIPTS / "digits_cnn.py")
    for arguments in (
        ["fit", path, "--train", "@head", "--memory", "4MiB", "--json"],
        ["measure", path, "--train", "@head", "--repeats", "1", "--no-predict", "--method", "freeze", "--json"],
    ):
        monkeypatch.setattr(sys, "argv", ["frostline", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        assert stopped.value.code == 0, err
        data = json.loads(out)
        if arguments[0] == "fit":
            assert data["rows"][0]["batch"]["size"] > 8  # more than the script's own
        else:
            assert data["rows"][0]["label"] == "@head"


def test_what_is_no_training_script_is_said(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="trains nothing") as said:
        load(write(tmp_path, "def build():\n    return None\n"))
    assert "It defines build." in said.value.__notes__[0]
    with pytest.raises(TargetError, match="failed before it trained"):
        load(write(tmp_path, "raise ValueError('no data')"))
    with pytest.raises(TargetError, match="--input is not for a training script"):
        load(str(SCRIPTS / "everything.py"), inputs=["8x128"])


def test_why_a_step_cannot_be_recorded_is_said(tmp_path: Path) -> None:
    step = """
import torch
weight = torch.randn(4, 1, requires_grad=True)
optimizer = torch.optim.SGD([weight], lr=0.1)
for _ in range(2):
    loss = (torch.randn(8, 4) @ weight).square().sum()
    {gradient}
    optimizer.step()
"""
    with pytest.raises(TargetError, match=r"it called no torch\.nn\.Module with parameters"):
        load(write(tmp_path, step.format(gradient="loss.backward()")))
    with pytest.raises(TargetError, match=r"it takes its gradients by torch\.autograd\.grad"):
        load(write(tmp_path, step.format(gradient="weight.grad, = torch.autograd.grad(loss, weight)")))


def test_flags_random_numbers_and_paths_are_put_back() -> None:
    before = sys.argv, list(sys.path), sys.modules["__main__"]
    load(str(SCRIPTS / "everything.py"))
    assert (sys.argv, sys.path, sys.modules["__main__"]) == before
    assert fl.__version__
