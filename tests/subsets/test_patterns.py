"""Names, globs and commas: what a pattern matches, and what one that matches nothing says."""

from __future__ import annotations

import pytest
from torch import nn

from frostline.errors import FrostlineError, SubsetError
from frostline.subsets import resolve


def test_parameter_name_is_that_parameter(model):
    assert resolve("classifier.bias", model).names == ("classifier.bias",)


def test_module_name_is_all_of_its_parameters(model):
    assert resolve("layer.1", model).names == tuple(
        n for n in dict(model.named_parameters()) if n.startswith("layer.1.")
    )


def test_module_name_does_not_match_modules_that_begin_alike():
    model = nn.ModuleDict({"fc": nn.Linear(2, 2), "fc2": nn.Linear(2, 2)})
    assert resolve("fc", model).names == ("fc.weight", "fc.bias")


def test_star_crosses_dots(model):
    assert resolve("*.bias", model).names == tuple(n for n in dict(model.named_parameters()) if n.endswith(".bias"))


def test_glob_of_modules_is_all_of_their_parameters(model):
    names = resolve("layer.*.attention", model).names
    assert len(names) == 3 * 4
    assert all(".attention." in name for name in names)


def test_bracket_without_colon_or_comma_is_a_character_class(model):
    assert resolve("layer.[01]", model) == resolve("layer.0,layer.1", model)
    assert resolve("layer.[0-1].norm.weight", model).names == ("layer.0.norm.weight", "layer.1.norm.weight")
    assert resolve("layer.[!0]", model) == resolve("layer.1,layer.2", model)


def test_names_are_case_sensitive(model):
    with pytest.raises(SubsetError, match="matches no parameter or module"):
        resolve("*.BIAS", model)


def test_comma_parts_patterns_and_spaces_do_not_count(model):
    assert resolve(" classifier , norm ", model) == resolve(["classifier", "norm"], model)


def test_names_come_in_the_order_of_the_model(model):
    assert resolve("classifier,embeddings", model).names == (
        "embeddings.weight",
        "classifier.weight",
        "classifier.bias",
    )


def test_exact_name_wins_over_reading_it_as_a_glob():
    model = nn.Module()
    model.register_module("odd[0]", nn.Linear(2, 2))
    assert resolve("odd[0].weight", model).names == ("odd[0].weight",)


def test_frozen_parameters_are_matched_too_and_stay_frozen(model):
    model.requires_grad_(False)
    assert len(resolve("classifier", model)) == 2
    assert not any(param.requires_grad for param in model.parameters())


def test_pattern_that_matches_nothing_names_the_closest(model):
    with pytest.raises(SubsetError, match=r"'clasifier' matches no .* Transformer. Closest: classifier \(module\)"):
        resolve("clasifier", model)
    with pytest.raises(SubsetError, match=r"Closest: layer.0.attention \(module\)"):
        resolve("attention", model)
    with pytest.raises(SubsetError, match=r"Write '\*attention\*'"):
        resolve("attention", model)
    with pytest.raises(SubsetError, match=r"Closest: classifier\.weight"):
        resolve("module.classifier.weight", model)
    with pytest.raises(SubsetError, match=r"Closest: layer\.0\.norm\.weight, "):
        resolve("orm.weight[:, 2]", model)
    with pytest.raises(SubsetError, match="It holds embeddings, layer, norm, classifier"):
        resolve("*.zzzzz", model)


def test_buffer_is_named_as_one():
    with pytest.raises(SubsetError, match="'running_mean' is a buffer of BatchNorm1d"):
        resolve("running_mean", nn.BatchNorm1d(2))


def test_brackets_that_do_not_fit_are_an_error(model):
    for text in ("classifier.weight[:2", "classifier.weight]", "classifier.weight[[0, 1], :]"):
        with pytest.raises(SubsetError, match=r"bracket|never closed"):
            resolve(text, model)


def test_every_error_is_a_frostline_error(model):
    with pytest.raises(FrostlineError):
        resolve("nothing", model)
