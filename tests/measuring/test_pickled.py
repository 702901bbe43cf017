"""What can be sent to another process, and what is said of what cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.measuring.networks import inputs, mlp, squares
from torch import nn

from frostline.errors import FrostlineError
from frostline.measuring import pickled


def test_what_is_written_is_read_again(tmp_path: Path):
    model, x = mlp().eval(), inputs()
    pickled.write(tmp_path / "step.pt", model, x, squares)
    again, x_again, loss = pickled.read(tmp_path / "step.pt")
    assert torch.equal(again[0].weight, model[0].weight)
    assert not again.training
    assert torch.equal(x_again, x)
    assert loss is squares


def test_a_lambda_is_refused_with_a_way_out(tmp_path: Path):
    with pytest.raises(FrostlineError, match=r"the loss cannot be sent .* fl\.measure\(\"file\.py:name\""):
        pickled.write(tmp_path / "step.pt", mlp(), inputs(), lambda y: y.sum())


def test_a_class_of_the_running_script_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Mine(nn.Linear):
        pass

    monkeypatch.setattr(Mine, "__module__", "__main__")
    with pytest.raises(FrostlineError, match="Mine is defined in the script itself"):
        pickled.write(tmp_path / "step.pt", nn.Sequential(Mine(2, 2)), inputs(), squares)
