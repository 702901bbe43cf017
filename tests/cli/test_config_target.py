"""A Hugging Face ``config.json`` as TARGET: built without weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")

from frostline.cli import main  # noqa: E402
from frostline.errors import TargetError  # noqa: E402
from frostline.targets import load  # noqa: E402

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    config = transformers.BertConfig(
        **SMALL, vocab_size=100, max_position_embeddings=64, architectures=["BertForMaskedLM"]
    )
    config.to_json_file(tmp_path / "config.json")
    return tmp_path


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    config = transformers.ViTConfig(
        **SMALL, image_size=32, patch_size=8, num_channels=1, architectures=["ViTForImageClassification"]
    )
    config.to_json_file(tmp_path / "config.json")
    return tmp_path


def test_the_model_of_the_architectures_is_built_on_meta(bert: Path) -> None:
    target = load(str(bert / "config.json"))
    assert type(target.model).__name__ == "BertForMaskedLM"
    assert {p.device.type for p in target.model.parameters()} == {"meta"}
    assert target.name == bert.name


def test_the_folder_does_as_well(bert: Path) -> None:
    assert type(load(str(bert)).model).__name__ == "BertForMaskedLM"


def test_tokens_are_made_up_and_stay_in_the_vocabulary(bert: Path) -> None:
    inputs = load(str(bert)).inputs
    assert tuple(inputs["input_ids"].shape) == (1, 64)  # 128, but for max_position_embeddings
    assert 0 <= int(inputs["input_ids"].min()) <= int(inputs["input_ids"].max()) < 100
    inputs = load(str(bert), ["2x16"]).inputs
    assert {name: tuple(t.shape) for name, t in inputs.items()} == {"input_ids": (2, 16)}
    inputs = load(str(bert), ["input_ids=2x16", "attention_mask=2x16"]).inputs
    assert bool(inputs["attention_mask"].all())


def test_an_image_has_the_size_of_the_config(vit: Path) -> None:
    assert tuple(load(str(vit)).inputs["pixel_values"].shape) == (1, 1, 32, 32)


def test_the_model_class_can_be_chosen(bert: Path) -> None:
    model = load(str(bert), model_class="AutoModelForSequenceClassification").model
    assert type(model).__name__ == "BertForSequenceClassification"


def test_the_command_costs_it(bert: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["frostline", "cost", str(bert), "--input", "2x16", "--train", "@last:1", "--sweep", "last", "--json"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    data = json.loads(capsys.readouterr().out)
    assert data["models"][0]["model"] == "BertForMaskedLM"
    assert data["sweep"][0]["num_blocks"] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("{}", "no 'model_type'"),
        ('{"model_type": "berd"}', "does not know model_type 'berd'"),
        ('{"model_type": "bert", "architectures": ["Berd"]}', "has no class 'Berd'"),
    ],
)
def test_a_config_that_is_none_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(TargetError, match=message):
        load(str(tmp_path / "config.json"))
