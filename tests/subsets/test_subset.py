"""The value that resolving gives."""

from __future__ import annotations

import json
import pickle

from frostline.subsets import resolve


def test_subset_is_a_value(mlp):
    subset = resolve("0.weight[:4],2", mlp)
    assert subset == resolve("2,0.weight[:4]", mlp)  # the label says how it was written, not what it is
    assert subset != resolve("0.weight[4:8],2", mlp)
    assert len({subset, resolve("2,0.weight[:4]", mlp)}) == 1
    assert pickle.loads(pickle.dumps(subset)) == subset
    assert list(subset) == ["0.weight", "2.weight", "2.bias"]
    assert "0.bias" not in subset
    assert str(subset) == "0.weight[:4],2"


def test_subset_to_dict_is_plain_data(mlp):
    data = json.loads(json.dumps(resolve("0.weight[:4],!2.bias", mlp).to_dict()))
    assert data == {
        "label": "0.weight[:4],!2.bias",
        "names": ["0.weight"],
        "slices": {"0.weight": ["[:4]"]},
        "num_tensors": 1,
        "num_parameters": 64,
        "matched": [
            {"pattern": "0.weight[:4]", "names": ["0.weight[:4]"], "note": ""},
            {"pattern": "!2.bias", "names": [], "note": ""},
        ],
    }


def test_match_lists_a_few_names_and_counts_the_rest(model):
    (match,) = resolve("@all", model).matched
    assert match.summary(2) == "@all matched embeddings.weight, layer.0.norm.weight and 33 more"
