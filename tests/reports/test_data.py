"""JSON: what the schema promises."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
import torch
from torch import nn

import frostline as fl
from frostline.costing.cost import RUN_METHODS
from frostline.reports.data import schema


def trace_of() -> fl.Trace:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    return fl.trace(model, torch.randn(8, 16), loss=lambda out: out.sum())


def assert_valid(data: dict[str, Any]) -> None:
    """It survives JSON and is what the schema says."""
    again = json.loads(json.dumps(data))
    assert again == data
    jsonschema.Draft202012Validator(schema()).validate(again)


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())


@pytest.mark.parametrize("train", ["2", "@biases", "0.weight[:, :8]"])
def test_a_cost_is_valid(train: str) -> None:
    cost = trace_of().cost(train)
    data = cost.to_dict()
    assert_valid(data)
    assert data["step_flops"] == cost.step_flops
    assert data["full"]["saved_bytes"] == cost.full.saved_bytes
    assert data["model"]["inputs"] == ["float32[8, 16]"]


def test_a_comparison_is_valid() -> None:
    data = trace_of().compare("2").to_dict()
    assert_valid(data)
    assert [row["label"] for row in data["rows"]] == list(RUN_METHODS)
    assert "floor" in [finding["kind"] for finding in data["findings"]]


def test_a_marginal_is_valid() -> None:
    assert_valid(trace_of().marginal("2").to_dict())


def test_a_key_too_many_is_invalid() -> None:
    with pytest.raises(jsonschema.ValidationError):
        assert_valid({**trace_of().cost("2").to_dict(), "surprise": 1})
