"""``--values``: what flows through the modules, held to the same numbers computed by hand."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import torch
from tests.watching.watching import watched, write
from torch import nn

import frostline as fl
from frostline.reports.data import schema
from frostline.watching.script import Script
from frostline.watching.watch import Watch

SOURCE = """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.Tanh())
with torch.no_grad():
    model[0].bias[:2] = -100  # two units are dead
    model[2].bias[0] = 50  # one is saturated
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
for _ in range(3):
    x = torch.randn(5, 4)
    optimizer.zero_grad()
    model(x).sum().backward()
    optimizer.step()
"""


def valued(path: Path) -> Watch:
    script = Script(str(path), [])
    seen = Watch(str(path), values=True)
    with seen:
        script.run(seen.close)
    return seen


def test_each_row_is_what_the_second_step_really_computed(tmp_path: Path) -> None:
    seen = valued(write(tmp_path, SOURCE))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), nn.Tanh())
    with torch.no_grad():
        model[0].bias[:2] = -100
        model[2].bias[0] = 50
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        x = torch.randn(5, 4)
        optimizer.zero_grad()
        outputs = [x]
        for module in model:
            outputs.append(module(outputs[-1]))
        outputs[-1].sum().backward()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
    assert [row.module for row in seen.values] == ["0", "1", "2", "3", "model"]
    assert {row.step for row in seen.values} == {2}
    for row, given, output in zip(seen.values, outputs, outputs[1:], strict=False):
        assert row.inputs == (f"float32{list(given.shape)}",)
        assert row.outputs == (f"float32{list(output.shape)}",)
        assert row.mean == pytest.approx(output.double().mean().item())
        assert row.std == pytest.approx(output.double().std(correction=0).item())
        assert row.zeros == (output == 0).sum().item() / output.numel()
    dead = (outputs[2] == 0).all(0).double().mean().item()
    saturated = (outputs[4].abs() >= 0.99).all(0).double().mean().item()
    assert dead >= 2 / 6
    assert saturated >= 1 / 3
    assert [row.idle for row in seen.values] == [None, dead, None, saturated, None]
    for row, first in ((seen.values[0], 0), (seen.values[2], 2)):
        own = list(model.parameters())[first : first + 2]
        gradient = torch.cat([p.grad.flatten() for p in own if p.grad is not None])
        weight = torch.cat([p.flatten() for p in before[first : first + 2]])
        assert row.gradient_norm == pytest.approx(gradient.norm().item())
        assert row.update_ratio == pytest.approx(0.5 * gradient.norm().item() / weight.norm().item(), rel=1e-4)
    assert seen.first_nonfinite is None
    assert "Tanh" in str(seen)


@pytest.mark.parametrize("step", [1, 2, 5])
def test_the_first_module_with_a_nan_is_named_in_any_step(step: int, tmp_path: Path) -> None:
    source = SOURCE.replace("range(3)", "range(1, 7)").replace("for _ in", "for step in").replace(
        "    optimizer.zero_grad()", f"    if step == {step}:\n        model[2].weight.data[0, 0] = float('nan')\n"
        "    optimizer.zero_grad()"
    )  # fmt: skip
    seen = valued(write(tmp_path, source))
    first = seen.first_nonfinite
    assert first is not None
    assert (first.module, first.step, first.nonfinite, first.input_nonfinite) == ("2", step, 5, 0)
    assert "the first NaN or Inf came out of 2 (Linear)" in str(seen)
    data = json.loads(json.dumps(seen.to_dict(), allow_nan=False))
    jsonschema.Draft202012Validator(schema()).validate(data)


def test_without_values_none_are_kept(tmp_path: Path) -> None:
    seen, _ = watched(write(tmp_path, SOURCE))
    assert (seen.values, seen.first_nonfinite) == ([], None)
    with fl.watch(values=True) as ours:
        pass
    assert ours.values == []
