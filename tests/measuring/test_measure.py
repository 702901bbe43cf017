"""``fl.measure``: rows beside full training, predicted beside measured."""

from __future__ import annotations

import json

import jsonschema
import pytest
from tests.measuring.networks import FILE, inputs, mlp, squares

import frostline as fl
from frostline.reports.data import schema


def test_a_model_in_memory_is_run_row_by_row():
    model, x = mlp().eval(), inputs()
    model[0].weight.requires_grad_(False)
    before = [(p.detach().clone(), p.requires_grad) for p in model.parameters()]
    found = fl.measure(
        model, x, squares, train={"head": "2", "all": "*"}, optimizer="sgd", repeats=2, threads=1, predict=False
    )
    assert [row.label for row in found] == ["head by optimizer-only", "head by freeze", "all"]
    assert found.full.label == "all"
    assert found.rounds == 2
    assert found.noise is not None
    assert found.ratio(found.full) == 1
    for row in found:
        assert row.measured is not None
        assert row.measured.forward_flops == row.predicted.forward_flops
        assert row.measured.backward_flops == row.predicted.backward_flops
        assert row.measured.saved_bytes == row.predicted.saved_bytes
    left = found["head by optimizer-only"].measured
    assert left is not None
    assert left.baseline_bytes["gradients"] == 2048
    data = json.loads(json.dumps(found.to_dict()))
    jsonschema.Draft202012Validator(schema()).validate(data)
    assert "eval mode" in str(found)
    assert not model.training
    for parameter, (values, flag) in zip(model.parameters(), before, strict=True):
        assert (parameter == values).all()
        assert parameter.requires_grad is flag


def test_train_only_is_run_and_held_to_the_lower_bound():
    found = fl.measure(
        mlp(), inputs(), squares, train={"head": "2"}, methods="train-only", repeats=2, threads=1, predict=False
    )
    row = found["head"]
    assert row.measured is not None
    assert row.measured.saved_bytes == row.predicted.saved_bytes
    data = json.loads(json.dumps(found.to_dict()))
    jsonschema.Draft202012Validator(schema()).validate(data)
    assert [f["kind"] for f in data["findings"]][:2] == ["bound", "needed"]


def test_what_cannot_be_measured_is_said_before_anything_starts():
    with pytest.raises(fl.FrostlineError, match="no method 'frozen'"):
        fl.measure(f"{FILE}:target", train="2", methods="frozen")
    with pytest.raises(fl.FrostlineError, match="by its name"):
        fl.measure(f"{FILE}:target", train="2", optimizer=print)  # type: ignore[arg-type]
    with pytest.raises(fl.FrostlineError, match="the loss cannot be sent"):
        fl.measure(mlp(), inputs(), lambda y: y.sum(), train="2")
    with pytest.raises(fl.FrostlineError, match="no subsets"):
        fl.measure(mlp(), inputs(), squares, train={})


def test_the_machine_is_looked_at_as_the_rows_run():
    found = fl.measure(mlp(), inputs(), squares, train={"head": "2"}, methods="freeze", repeats=2, threads=1)
    looks = [row.measured.reference_seconds for row in found if row.measured]
    assert found.timed_at is not None
    assert found.timed_at > 0
    assert None not in looks
    assert min(looks) / found.timed_at <= found.pace <= max(looks) / found.timed_at
    data = json.loads(json.dumps(found.to_dict()))
    jsonschema.Draft202012Validator(schema()).validate(data)
    assert data["pace"] == found.pace
