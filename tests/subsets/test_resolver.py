"""Every kind of ``train=``: lists and ``!``, modules, parameters, optimizers, predicates, subsets."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass

import pytest
import torch
from tests.subsets.networks import NETWORKS, Transformer, hugging_face, with_integers
from torch import nn

from frostline.errors import SubsetError
from frostline.subsets import Subset, resolve


def test_bang_takes_away(model):
    assert resolve(["classifier", "!*.bias"], model).names == ("classifier.weight",)
    assert resolve("classifier,!*.bias", model).names == ("classifier.weight",)


def test_list_starting_with_bang_begins_from_all(model):
    assert set(resolve("!layer", model)) == {
        "embeddings.weight",
        "norm.weight",
        "norm.bias",
        "classifier.weight",
        "classifier.bias",
    }


def test_list_is_read_in_order(model):
    assert resolve(["classifier", "!*.bias", "classifier.bias"], model) == resolve("classifier", model)


def test_bang_of_a_built_in(model):
    assert resolve(["@all", "!@head"], model) == resolve("!classifier", model)


def test_taking_away_what_was_not_chosen_changes_nothing(model):
    subset = resolve("classifier,!norm", model)
    assert subset == resolve("classifier", model)
    assert str(subset.matched[1]) == "!norm took away nothing"


def test_taking_away_a_pattern_that_matches_nothing_is_an_error(model):
    with pytest.raises(SubsetError, match="'normm' matches no parameter"):
        resolve("@all,!normm", model)


def test_list_may_mix_patterns_modules_and_parameters(model):
    subset = resolve(["@head", model.norm, model.embeddings.weight], model)
    assert subset == resolve("classifier,norm,embeddings", model)
    assert subset.label == "@head,module norm,embeddings.weight"


def test_taking_away_everything_is_an_error(model):
    with pytest.raises(SubsetError, match="leaves nothing to train"):
        resolve("classifier,!classifier", model)


def test_none_is_now(model):
    model.requires_grad_(False)
    model.norm.requires_grad_(True)
    assert resolve(None, model).names == ("norm.weight", "norm.bias")
    assert resolve(None, model) == resolve("@now", model)
    assert resolve(None, model).label == "@now"


def test_module_is_found_by_identity(model):
    assert resolve(model.classifier, model) == resolve("classifier", model)
    assert resolve(model, model) == resolve("@all", model)
    with pytest.raises(SubsetError, match="this Linear is not a module of this Transformer"):
        resolve(nn.Linear(8, 4), model)


def test_module_without_parameters_is_an_error(mlp):
    with pytest.raises(SubsetError, match="holds no parameters"):
        resolve(mlp[1], mlp)
    with pytest.raises(SubsetError, match=r"'1' matches '1' \(ReLU\), which holds no parameters"):
        resolve("1", mlp)


def test_parameters_are_found_by_identity(model):
    assert resolve(model.classifier.weight, model).names == ("classifier.weight",)
    assert resolve(model.classifier.parameters(), model) == resolve("classifier", model)
    assert resolve(model.classifier.parameters(), model).label == "2 parameters"
    assert resolve(list(model.named_parameters())[:1], model).names == ("embeddings.weight",)


def test_foreign_parameter_is_an_error_with_its_shape(model):
    with pytest.raises(SubsetError, match=r"first of shape \[4, 8\] \('classifier.weight' has this shape\)"):
        resolve([model.norm.weight, nn.Parameter(torch.zeros(4, 8))], model)


def test_optimizer_is_the_parameters_it_holds(model):
    groups = [{"params": model.classifier.parameters()}, {"params": [model.norm.weight], "lr": 0.1}]
    subset = resolve(torch.optim.Adam(groups), model)
    assert subset.names == ("norm.weight", "classifier.weight", "classifier.bias")
    assert subset.label == "Adam optimizer"


def test_optimizer_over_another_model_is_an_error(model):
    with pytest.raises(SubsetError, match=r"the SGD optimizer holds 2 tensors .* first of shape \[2, 3\]"):
        resolve(torch.optim.SGD(nn.Linear(3, 2).parameters(), lr=0.1), model)


def test_optimizer_notes_parameters_that_are_frozen(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.classifier.requires_grad_(False)
    assert resolve(optimizer, model).matched[0].note == "2 of them frozen now"


def test_predicate_is_asked_about_every_parameter(model):
    assert resolve(lambda name, param: param.dim() == 2 and "mlp" in name, model) == resolve("*.mlp.*.weight", model)

    def is_vector(name: str, param: nn.Parameter) -> bool:
        return param.dim() == 1

    assert resolve(is_vector, model).label == "predicate is_vector"


def test_predicate_that_fails_says_on_which_parameter(model):
    with pytest.raises(ZeroDivisionError) as caught:
        resolve(lambda name, param: 1 // 0, model)
    assert "embeddings.weight" in caught.value.__notes__[0]


def test_predicate_that_takes_none_is_an_error(model):
    with pytest.raises(SubsetError, match="matches none of the 35 parameters"):
        resolve(lambda name, param: False, model)


def test_plan_is_its_subset(model):
    @dataclass
    class Plan:
        subset: Subset

    assert resolve(Plan(resolve("@head", model)), model) == resolve("@head", model)


def test_subset_is_checked_against_the_model(model, mlp):
    subset = resolve("@last:1,!*.bias", model)
    again = resolve(subset, Transformer())
    assert again == subset
    assert again.label == "@last:1,!*.bias"
    assert again.matched == subset.matched
    with pytest.raises(SubsetError, match="does not have"):
        resolve(subset, mlp)


def test_subset_of_other_shapes_is_an_error():
    small, large = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 4))
    with pytest.raises(SubsetError, match=r"with shape \[2, 2\], but in this Sequential it has shape \[4, 2\]"):
        resolve(resolve("0", small), large)
    with pytest.raises(SubsetError, match="with shape"):
        resolve(resolve("0.weight[:1]", small), large)


def test_bare_subset_of_names_gets_its_shapes(model):
    subset = resolve(Subset(("norm.weight",)), model)
    assert subset.num_parameters() == 8
    with pytest.raises(SubsetError, match="resolve"):
        Subset(("norm.weight",)).num_parameters()


@pytest.mark.parametrize("train", [3, nn.Linear, {"head": "classifier"}, [], "", " , ", [3]])
def test_anything_else_is_an_error_that_says_what_is_accepted(train, model):
    with pytest.raises(SubsetError, match="Pass a name or glob"):
        resolve(train, model)


def test_model_must_be_a_module():
    with pytest.raises(SubsetError, match=r"not a torch\.nn\.Module"):
        resolve("@all", [nn.Linear(2, 2)])  # type: ignore[arg-type]


def test_integer_parameter_asked_for_by_name_is_an_error_with_its_dtype():
    model = with_integers()
    with pytest.raises(SubsetError, match=r"'0.weight', which is torch.int8 and cannot train"):
        resolve("0.weight", model)
    with pytest.raises(SubsetError, match="cannot train"):
        resolve("0.weight[:1]", model)
    with pytest.raises(SubsetError, match="cannot train"):
        resolve([model[0].weight], model)


def test_integer_parameters_are_left_out_of_a_wider_match():
    subset = resolve("0", with_integers())
    assert subset.names == ("0.bias",)
    assert subset.matched[0].note == "left out 0.weight: torch.int8 cannot train"
    assert resolve("*", with_integers()) == resolve("@all", with_integers())


def test_resolving_changes_nothing(model):
    model.norm.requires_grad_(False)
    flags = {name: (param.requires_grad, id(param)) for name, param in model.named_parameters()}
    for train in (None, "@head,!*.bias", "@last:2", model.layer, "classifier.weight[:2]"):
        resolve(train, model)
    assert {name: (param.requires_grad, id(param)) for name, param in model.named_parameters()} == flags


# ----------------------------------------------------------------- lists of exact names, which skip the search


def test_list_of_exact_names_is_read_without_a_search(model, monkeypatch):
    names = [name for name, _ in model.named_parameters()]
    monkeypatch.setattr("frostline.subsets.resolver.find", None)
    assert resolve(names, model).names == tuple(names)
    with pytest.raises(TypeError):
        resolve(",".join(names), model)


@pytest.mark.parametrize("build", [*NETWORKS, lambda: hugging_face("t5"), lambda: hugging_face("gpt2")])
def test_list_of_names_is_in_every_field_what_the_same_patterns_are(build):
    model = build()
    trainable = [name for name, param in model.named_parameters() if param.is_floating_point()]
    tied = [name for name, param in model.named_parameters(remove_duplicate=False) if param.is_floating_point()]
    rng = random.Random(0)
    for known in (trainable, tied):
        for _ in range(20):
            names = rng.choices(known, k=rng.randint(1, len(known)))  # in any order, some of them twice
            assert asdict(resolve(names, model)) == asdict(resolve(",".join(names), model))


def test_list_of_names_joins_what_a_list_around_it_chose(mlp):
    assert resolve(["0.weight[:4]", ["0.weight", "2.bias"]], mlp) == resolve("0.weight,2.bias", mlp)
    assert resolve([["0.weight", "2.bias"], "!0.weight[4:]"], mlp).spelled() == ("0.weight[:4]", "2.bias")


@pytest.mark.parametrize("name", ["odd[0]", "a,b", "[", "@all", "!c", " d "])
def test_list_reads_an_odd_name_as_a_pattern(name):
    model = nn.Module()
    model.register_module(name, nn.Linear(2, 2))
    model.register_module("c", nn.Linear(2, 2))

    def outcome(train: object) -> object:
        try:
            return asdict(resolve(train, model))
        except SubsetError as error:
            return str(error)

    assert outcome([f"{name}.weight"]) == outcome(f"{name}.weight")


def test_list_with_an_integer_parameter_is_an_error_with_its_dtype():
    with pytest.raises(SubsetError, match=r"'0.weight', which is torch.int8 and cannot train"):
        resolve(["0.bias", "0.weight"], with_integers())
