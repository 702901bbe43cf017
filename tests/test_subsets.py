"""``train=`` becomes a Subset: what each way of writing it means, and what each mistake says."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from frostline.errors import FrostlineError, SubsetError
from frostline.subsets import BUILT_INS, Subset, TensorSlice, blocks, num_blocks, resolve


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class Transformer(nn.Module):
    """Embedding, three blocks, final norm, classifier: 3 * 10 + 1 + 2 + 2 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(20, 8)
        self.layer = nn.ModuleList(Block(8) for _ in range(3))
        self.norm = nn.LayerNorm(8)
        self.classifier = nn.Linear(8, 4)


class TiedLM(Transformer):
    """The classifier is an output embedding, tied to the input's."""

    def __init__(self) -> None:
        super().__init__()
        del self.classifier
        self.lm_head = nn.Linear(8, 20, bias=False)
        self.lm_head.weight = self.embeddings.weight


class BasicBlock(nn.Module):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n_in, n_out, 3, bias=False)
        self.bn = nn.BatchNorm2d(n_out)
        self.downsample = nn.Sequential(nn.Conv2d(n_in, n_out, 1), nn.BatchNorm2d(n_out)) if n_in != n_out else None


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.layer1 = nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 4))
        self.layer2 = nn.Sequential(BasicBlock(4, 8), BasicBlock(8, 8))
        self.layer3 = nn.Sequential(BasicBlock(8, 16))
        self.fc = nn.Linear(16, 5)


@pytest.fixture
def model() -> Transformer:
    return Transformer()


@pytest.fixture
def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def with_integers() -> nn.Module:
    """A layer whose weight is stored as integers, as quantised models keep theirs."""
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return nn.Sequential(layer, nn.Linear(4, 2))


# --------------------------------------------------------------------------------------------- names and globs


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


# ---------------------------------------------------------------------------------------------- lists and '!'


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


# ----------------------------------------------------------------------------------- modules, parameters, others


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


# ---------------------------------------------------------------------------------------------------- built-ins


def test_all_is_every_floating_or_complex_parameter():
    model = with_integers()
    model.register_parameter("phase", nn.Parameter(torch.zeros(3, dtype=torch.complex64)))
    assert resolve("@all", model).names == ("phase", "0.bias", "1.weight", "1.bias")


def test_biases_are_vectors_with_bias_in_their_own_name():
    model = nn.Module()
    model.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)  # bias_k is [1, 1, 4]: not a vector
    model.lstm = nn.LSTM(4, 3)
    model.relative_attention_bias = nn.Embedding(8, 2)  # its own name is weight
    model.register_parameter("q_bias", nn.Parameter(torch.zeros(4)))
    model.register_parameter("bias_table", nn.Parameter(torch.zeros(4, 2)))
    model.register_parameter("unbiased", nn.Parameter(torch.zeros(4)))
    assert resolve("@biases", model).names == (
        "q_bias",
        "attention.in_proj_bias",
        "attention.out_proj.bias",
        "lstm.bias_ih_l0",
        "lstm.bias_hh_l0",
    )


def test_parametrized_bias_is_still_a_bias():
    layer = nn.utils.parametrize.register_parametrization(nn.Linear(2, 2), "bias", nn.Tanh())
    assert resolve("@biases", layer).names == ("parametrizations.bias.original",)


def test_norms_are_what_normalisation_modules_own():
    class LlamaRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    class ChannelNorm(nn.Module):  # a scale a channel, shaped to broadcast
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4, 1, 1))

    class NormedLinear(nn.Module):  # Norm in its name, a matrix in its hands
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

    class PreNorm(nn.Module):  # owns nothing itself: only the norm inside counts
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)
            self.body = nn.Linear(4, 4)

    model = nn.ModuleList(
        [
            nn.Linear(4, 4),
            nn.BatchNorm1d(4),
            nn.GroupNorm(2, 4),
            nn.InstanceNorm2d(4, affine=True),
            nn.LayerNorm([4, 3]),
            nn.RMSNorm(4),
            LlamaRMSNorm(),
            ChannelNorm(),
            NormedLinear(),
            PreNorm(),
            nn.LocalResponseNorm(2),
        ]
    )
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in resolve("@norms", model)))
    assert owners == ["1", "2", "3", "4", "5", "6", "7", "9.norm"]


def test_head_of_an_mlp_is_its_last_layer(mlp):
    assert resolve("@head", mlp).names == ("2.weight", "2.bias")
    assert str(resolve("@head", mlp).matched[0]) == "@head matched 2.weight, 2.bias"


def test_head_holding_most_parameters_is_still_the_last_layer():
    large = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 100), nn.ReLU(), nn.Linear(100, 100)))
    assert resolve("@head", large).names == ("1.2.weight", "1.2.bias")


def test_head_of_small_layers_is_all_of_them():
    small = nn.Sequential(nn.Linear(100, 100), nn.Sequential(nn.Linear(100, 10), nn.ReLU(), nn.Linear(10, 2)))
    assert resolve("@head", small) == resolve("1", small)


@pytest.mark.parametrize("wrap", [lambda m: nn.Sequential(m), lambda m: nn.ModuleDict({"module": nn.ModuleList([m])})])
def test_head_of_a_wrapper_is_the_wrapped_models(wrap, model):
    assert [name.split(".")[-2] for name in resolve("@head", wrap(model))] == ["classifier", "classifier"]


def test_head_of_a_resnet_and_an_lstm_is_fc():
    assert resolve("@head", ResNet()).names == ("fc.weight", "fc.bias")
    lstm = nn.ModuleDict({"embedding": nn.Embedding(9, 4), "lstm": nn.LSTM(4, 4), "fc": nn.Linear(4, 2)})
    assert resolve("@head", lstm).names == ("fc.weight", "fc.bias")


def test_head_of_a_unet_is_the_last_convolution():
    unet = nn.ModuleDict({"down": BasicBlock(3, 8), "up": BasicBlock(8, 16), "out": nn.Conv2d(16, 1, 1)})
    assert resolve("@head", unet).names == ("out.weight", "out.bias")


def test_head_of_a_model_without_one_is_its_last_block():
    encoder = nn.ModuleDict({"embeddings": nn.Embedding(1000, 8), "layer": nn.ModuleList(Block(8) for _ in range(3))})
    assert resolve("@head", encoder) == resolve("layer.2", encoder)


def test_head_of_a_single_layer_is_the_layer():
    assert resolve("@head", nn.Linear(2, 3)).names == ("weight", "bias")


def test_head_tied_to_the_embedding_is_the_embedding_and_says_so():
    subset = resolve("@head", TiedLM())
    assert subset.names == ("embeddings.weight",)
    assert subset.matched[0].note == "lm_head.weight is tied to embeddings.weight"


def test_declared_head_wins_over_registration_order():
    class Declares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)
            self.backbone = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

        def get_classifier(self) -> nn.Module:
            return self.fc

    assert resolve("@head", Declares()).names == ("fc.weight", "fc.bias")


def test_last_is_the_last_blocks_and_what_comes_after(model):
    assert blocks(model) == ["layer.0", "layer.1", "layer.2"]
    assert resolve("@last:1", model) == resolve("layer.2,norm,classifier", model)
    assert resolve("@last:3", model) == resolve("!embeddings", model)


def test_last_leaves_out_a_head_tied_to_the_embedding():
    subset = resolve("@last:2", TiedLM())
    assert subset == resolve("layer.[12],norm", TiedLM())
    assert "lm_head.weight is left out: tied to embeddings.weight" in subset.matched[0].note


def test_last_leaves_out_embeddings_registered_after_the_blocks():
    model = Transformer()
    model.position_embeddings = nn.Embedding(5, 8)
    subset = resolve("@last:1", model)
    assert "position_embeddings.weight" not in subset
    assert subset.matched[0].note == "position_embeddings.weight is left out: an embedding"


def test_last_past_the_number_of_blocks_says_how_many_there_are(model):
    with pytest.raises(SubsetError, match=r"'@last:4': Transformer has 3 blocks .* Write '@last:3' or less"):
        resolve("@last:4", model)


@pytest.mark.parametrize("text", ["@last:0", "@last:-1", "@last:two", "@last:"])
def test_last_needs_a_positive_whole_number(text, model):
    with pytest.raises(SubsetError, match="whole number from 1 to 3"):
        resolve(text, model)


def test_blocks_of_stages_are_counted_through():
    assert blocks(ResNet()) == ["layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0"]
    staged = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.Sequential(BasicBlock(4, 8), BasicBlock(8, 8)),
        nn.Sequential(BasicBlock(8, 16), BasicBlock(16, 16)),
    )
    assert blocks(staged) == ["1.0", "1.1", "2.0", "2.1"]


def test_experts_of_a_mixture_are_not_blocks():
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)) for _ in range(4))

    assert blocks(nn.ModuleDict({"layers": nn.ModuleList(Layer() for _ in range(3))})) == [
        f"layers.{i}" for i in range(3)
    ]


def test_blocks_of_sibling_towers_of_other_classes_are_counted_through():
    class Other(Block):
        pass

    class Tower(nn.Module):
        def __init__(self, kind: type[Block]) -> None:
            super().__init__()
            self.layers = nn.ModuleList(kind(4) for _ in range(2))

    class EncoderDecoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = Tower(Block), Tower(Other)

    towers = EncoderDecoder()
    assert blocks(towers) == ["encoder.layers.0", "encoder.layers.1", "decoder.layers.0", "decoder.layers.1"]


def test_layers_are_the_blocks_where_nothing_repeats(mlp):
    vgg = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Linear(4, 2))
    assert blocks(vgg) == ["0", "3", "4"]
    assert num_blocks(mlp) == 2
    assert resolve("@last:1", mlp).names == ("2.weight", "2.bias")
    assert resolve("@last:3", vgg) == resolve("@all", vgg)


def test_one_block_shared_many_times_is_no_stack_of_blocks():
    block = Block(8)
    shared = nn.ModuleDict({"layers": nn.ModuleList([block, block, block]), "fc": nn.Linear(8, 2)})
    assert blocks(shared)[-1] == "fc"
    assert resolve("layers.2", shared) == resolve("layers.0", shared)


def test_small_mlp_head_does_not_join_the_blocks():
    model = Transformer()
    model.classifier = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    assert blocks(model) == ["layer.0", "layer.1", "layer.2"]
    assert resolve("@last:1", model) == resolve("layer.2,norm,classifier", model)


def test_unknown_built_in_lists_them_all(model):
    with pytest.raises(SubsetError, match=r"'@bias'.* Did you mean @biases\?") as caught:
        resolve("@bias", model)
    assert all(name in str(caught.value) for name in BUILT_INS)


def test_built_in_that_matches_nothing_is_an_error(mlp):
    with pytest.raises(SubsetError, match="@norms matches none of the 4 parameters"):
        resolve("@norms", mlp)
    with pytest.raises(SubsetError, match="no parameter of Sequential requires grad now"):
        resolve("@now", mlp.requires_grad_(False))
    with pytest.raises(SubsetError, match="ReLU has no parameters"):
        resolve("@all", nn.ReLU())


# ------------------------------------------------------------------------------------------------- tied and odd


def test_any_name_of_a_tied_parameter_means_it():
    for name in ("lm_head", "lm_head.weight", "lm_*", "embeddings"):
        assert resolve(name, TiedLM()).names == ("embeddings.weight",)
    assert "lm_head.weight is tied to embeddings.weight" in str(resolve("lm_head", TiedLM()).matched[0])
    assert resolve("embeddings", TiedLM()).matched[0].note == ""


def test_slice_of_a_tied_name_is_a_slice_of_the_parameter():
    assert resolve("lm_head.weight[18:]", TiedLM()).spelled() == ("embeddings.weight[18:]",)


@pytest.mark.parametrize("mode", [lambda: torch.device("meta"), FakeTensorMode])
def test_meta_and_fake_parameters_resolve_as_real_ones_do(mode):
    with mode():
        built = TiedLM()
    for train in ("@all", "@head", "@norms", "@biases", "@last:2", "lm_head.weight[2:, :3]"):
        assert resolve(train, built) == resolve(train, TiedLM())


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


def test_lazy_parameters_need_a_forward_first():
    lazy = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    with pytest.raises(SubsetError, match="Run one forward first"):
        resolve("1", lazy)
    lazy(torch.zeros(1, 3))
    assert resolve("0", lazy).num_parameters() == 3 * 4 + 4


def test_resolving_changes_nothing(model):
    model.norm.requires_grad_(False)
    flags = {name: (param.requires_grad, id(param)) for name, param in model.named_parameters()}
    for train in (None, "@head,!*.bias", "@last:2", model.layer, "classifier.weight[:2]"):
        resolve(train, model)
    assert {name: (param.requires_grad, id(param)) for name, param in model.named_parameters()} == flags


# ------------------------------------------------------------------------------------------------------- errors


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


# ------------------------------------------------------------------------------------------------------- slices


def test_slice_trains_a_part(mlp):
    subset = resolve("0.weight[:, 8:],2", mlp)
    assert subset.names == ("0.weight", "2.weight", "2.bias")
    assert subset.slices["0.weight"][0].index == (slice(0, 32, 1), slice(8, 16, 1))
    assert subset.num_elements("0.weight") == 32 * 8
    assert subset.num_elements("0.bias") == 0
    assert subset.num_parameters() == 32 * 8 + 4 * 32 + 4
    assert not subset.is_whole("0.weight")
    assert subset.is_whole("2.weight")
    assert len(subset) == 3


@pytest.mark.parametrize(
    ("written", "spelled"),
    [
        ("[30:]", "[30:]"),
        ("[-2:]", "[30:]"),
        ("[3, :]", "[3:4]"),
        ("[-1, -1]", "[31:, 15:]"),
        ("[..., 0]", "[:, :1]"),
        ("[4:8, ...]", "[4:8]"),
        ("[::2]", "[::2]"),
        ("[1:32:5,]", "[1::5]"),
        ("[:7:5]", "[:6:5]"),
        ("[0:1:9]", "[:1]"),
        ("[ 2 : 4 ]", "[2:4]"),
        ("[30:99]", "[30:]"),
    ],
)
def test_slice_prints_as_python_writes_it(written, spelled, mlp):
    assert resolve(f"0.weight{written}", mlp).spelled() == (f"0.weight{spelled}",)


def test_glob_before_the_bracket_slices_each(model):
    subset = resolve("layer.*.norm.*[:4]", model)
    assert len(subset.slices) == 6
    assert subset.num_parameters() == 6 * 4


def test_slice_of_everything_is_the_whole_tensor(mlp):
    assert resolve("0.weight[:, :]", mlp) == resolve("0.weight", mlp)
    assert resolve("0.weight[:32, :999]", mlp).slices == {}


def test_slices_of_one_tensor_are_joined(mlp):
    assert resolve("0.weight[:4],0.weight[4:8]", mlp).spelled() == ("0.weight[:8]",)
    overlapping = resolve(["0.weight[:10]", "0.weight[5:, :4]"], mlp)
    assert overlapping.num_elements("0.weight") == 10 * 16 + 22 * 4
    assert resolve("0.weight[::2],0.weight[1::2]", mlp) == resolve("0.weight", mlp)


def test_whole_and_slice_is_whole(mlp):
    assert resolve("0.weight,0.weight[:4]", mlp) == resolve("0.weight", mlp)
    assert resolve("0.weight[:4],0.weight", mlp) == resolve("0.weight", mlp)


def test_slice_can_be_taken_away(mlp):
    assert resolve("0.weight,!0.weight[:, 4:8]", mlp).spelled() == ("0.weight[:, :4]", "0.weight[:, 8:]")
    assert resolve("0.weight[:8],!0.weight[4:]", mlp).spelled() == ("0.weight[:4]",)
    assert resolve("0,!0.weight[:]", mlp).names == ("0.bias",)


def test_spelled_resolves_to_the_same_subset(mlp):
    subset = resolve("0.weight[::3, 2:9],0.weight[5, :],2.bias", mlp)
    assert resolve(list(subset.spelled()), mlp) == subset
    assert resolve(subset, mlp) == subset


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("0.weight[32:]", r"0.weight\[32:\], where 0.weight has shape \[32, 16\]: '32:' holds nothing in dimension 0"),
        ("0.weight[4:4, :]", "holds nothing"),
        ("0.weight[32, :]", "index 32 is out of range for dimension 0, which has size 32"),
        ("0.weight[:, -17]", "index -17 is out of range for dimension 1"),
        ("0.bias[:, 2]", "2 given for 1 dimensions"),
        ("0.weight[::-1]", "A step must be 1 or more"),
        ("0.weight[::0]", "A step must be 1 or more"),
        ("0.weight[a:b]", "cannot read 'a:b'"),
        ("0.weight[:, None]", "cannot read 'None'"),
        ("0.weight[1:2:3:4]", "cannot read"),
        ("0.weight[..., ...]", "one '...' only"),
        ("0[:, 2]", r"'0' is a module \(Linear\) and only a parameter can be sliced. It holds 0.weight, 0.bias"),
        ("3.weight[:2]", r"'3.weight\[:2\]' matches no parameter .* Closest: "),
        ("*[:, 2]", "2 given for 1 dimensions"),
    ],
)
def test_slice_that_does_not_fit_is_an_error(pattern, says, mlp):
    with pytest.raises(SubsetError, match=says):
        resolve(pattern, mlp)


def test_too_many_slices_of_one_tensor_are_an_error():
    with pytest.raises(SubsetError, match="falls into 2000 slices"):
        resolve("!weight[::2000]", nn.Linear(1, 40_000))


def test_slice_of_a_scalar_is_the_scalar():
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(()))
    assert resolve("scale[...,]", model) == resolve("scale", model)
    assert str(TensorSlice.whole(())) == "[...]"


def test_part_outside_of_its_tensor_is_an_error():
    with pytest.raises(SubsetError, match="no part of a tensor of shape"):
        TensorSlice((4,), (range(2, 6),))


SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


@st.composite
def shape_and_index(draw):
    """A shape and the text of an index that Python accepts for it; it may hold nothing."""
    shape = draw(SHAPES)
    parts = []
    count = draw(st.integers(1, len(shape)))
    leading = draw(st.booleans())  # "[..., 2]" indexes the last dimensions, "[2, ...]" and "[2]" the first
    for size in shape[-count:] if leading else shape[:count]:
        bound = st.one_of(st.just(""), st.integers(-size - 2, size + 2).map(str))
        step = st.sampled_from(["", ":", ":1", ":2", ":5"])
        sliced = st.tuples(bound, bound, step).map(lambda s: f"{s[0]}:{s[1]}{s[2]}")
        parts.append(draw(st.one_of(sliced, st.integers(-size, size - 1).map(str))))
    if leading or draw(st.booleans()):
        parts.insert(0 if leading else count, "...")
    return shape, f"[{', '.join(parts)}]"


@settings(deadline=None, max_examples=200)
@given(shape_and_index())
def test_slice_holds_what_torch_takes(case):
    shape, text = case
    taken = eval(f"tensor{text}", {"tensor": torch.arange(torch.Size(shape).numel()).reshape(shape)})
    if not taken.numel():
        with pytest.raises(SubsetError, match="holds nothing"):
            TensorSlice.parse(text, shape)
        return
    part = TensorSlice.parse(text, shape)
    assert part.numel == taken.numel()
    ours = torch.arange(torch.Size(shape).numel()).reshape(shape)[part.index]
    assert ours.shape == part.shape
    assert torch.equal(ours.flatten(), taken.flatten())
    assert TensorSlice.parse(str(part), shape) == part


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_union_and_difference_of_slices_are_those_of_their_elements(data):
    shape = data.draw(st.lists(st.integers(2, 12), min_size=1, max_size=3).map(tuple))
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.zeros(shape))
    expected = torch.zeros(shape, dtype=torch.bool)
    patterns = []
    for _ in range(data.draw(st.integers(1, 4))):
        dims = []
        for size in shape:
            start = data.draw(st.integers(0, size - 1))
            dims.append(slice(start, data.draw(st.integers(start + 1, size)), data.draw(st.integers(1, 4))))
        away = bool(patterns) and data.draw(st.booleans())
        expected[tuple(dims)] = not away
        patterns.append(("!" if away else "") + f"weight[{', '.join(f'{d.start}:{d.stop}:{d.step}' for d in dims)}]")
    if not expected.any():
        with pytest.raises(SubsetError, match="nothing to train"):
            resolve(patterns, layer)
        return
    subset = resolve(patterns, layer)
    times = torch.zeros(shape, dtype=torch.int64)
    for part in subset.slices.get("weight", (TensorSlice.whole(shape),)):
        times[part.index] += 1
    assert torch.equal(times, expected.long())  # each element once, so the parts do not overlap
    assert subset.num_parameters() == expected.sum()


# -------------------------------------------------------------------------------------------------- the value


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


# ------------------------------------------------------------------------------------------- Hugging Face models

SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}


def build(name: str) -> nn.Module:
    """A tiny transformers model on meta."""
    hf = pytest.importorskip("transformers")
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 50}
    bart = {"d_model": 16, "vocab_size": 50, "encoder_layers": 2, "decoder_layers": 2}
    bart |= {
        f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("attention_heads", 2), ("ffn_dim", 32))
    }
    gpt2 = {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
    image = {"image_size": 32, "patch_size": 8}
    swin = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
    llama = {**SMALL, "vocab_size": 50, "num_key_value_heads": 2}
    with torch.device("meta"):
        return {
            "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**SMALL, vocab_size=50)),
            "bert-mlm": lambda: hf.BertForMaskedLM(hf.BertConfig(**SMALL, vocab_size=50)),
            "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**SMALL, vocab_size=50)),
            "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**gpt2)),
            "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**t5)),
            "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**bart)),
            "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**llama)),
            "vit": lambda: hf.ViTForImageClassification(hf.ViTConfig(**SMALL, **image)),
            "swin": lambda: hf.SwinForImageClassification(hf.SwinConfig(**swin)),
        }[name]()


@pytest.mark.parametrize(
    ("name", "head", "count", "first", "last"),
    [
        ("bert", "classifier", 3, "bert.encoder.layer.0", "bert.encoder.layer.2"),
        ("bert-mlm", "cls", 3, "bert.encoder.layer.0", "bert.encoder.layer.2"),
        ("roberta", "classifier", 3, "roberta.encoder.layer.0", "roberta.encoder.layer.2"),
        ("gpt2", "transformer.wte", 3, "transformer.h.0", "transformer.h.2"),
        ("t5", "shared", 4, "encoder.block.0", "decoder.block.1"),
        ("bart", "model.shared", 4, "model.encoder.layers.0", "model.decoder.layers.1"),
        ("llama", "lm_head", 3, "model.layers.0", "model.layers.2"),
        ("vit", "classifier", 3, None, None),
        ("swin", "classifier", 4, "swin.encoder.layers.0.blocks.0", "swin.encoder.layers.1.blocks.1"),
    ],
)
def test_head_and_blocks_of_hugging_face_models(name, head, count, first, last):
    model = build(name)
    assert resolve("@head", model) == resolve(head, model)
    found = blocks(model)
    assert len(found) == count
    if first:  # where ViT keeps its layers depends on the version of transformers
        assert (found[0], found[-1]) == (first, last)
    after = resolve("@last:1", model)
    assert set(resolve(found[-1], model)) <= set(after)
    assert not any("embed" in name or "shared" in name or "wte" in name for name in after)
    assert not any(name.startswith(f"{block}.") for name in after for block in found[:-1])


def test_last_decoder_block_of_t5_brings_its_final_norm_only():
    t5 = build("t5")
    subset = resolve("@last:1", t5)
    assert subset == resolve("decoder.block.1,decoder.final_layer_norm", t5)
    assert "lm_head.weight is left out" in subset.matched[0].note


@pytest.mark.parametrize(
    ("name", "count"), [("llama", 2 * 3 + 1), ("bert", 2 * (1 + 2 * 3)), ("t5", 2 + 3 * 2 + 2 + 2)]
)
def test_norms_of_hugging_face_models(name, count):
    names = resolve("@norms", build(name))
    assert len(names) == count
    assert all("norm" in name.lower() for name in names)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft 0.21's own
def test_head_of_a_peft_model_is_the_copy_that_trains():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])
    model = peft.get_peft_model(build("bert"), config)
    assert [name.split(".", 3)[3] for name in resolve("@head", model)] == [
        "modules_to_save.default.weight",
        "modules_to_save.default.bias",
    ]
    assert set(resolve("@head", model)) < set(resolve("@now", model))
