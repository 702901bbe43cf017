"""The built-in subsets: ``@all``, ``@biases``, ``@norms``, ``@last:K``, and those that do not exist."""

from __future__ import annotations

import pytest
import torch
from tests.subsets.networks import TiedLM, Transformer, hugging_face, with_integers
from torch import nn

from frostline.errors import SubsetError
from frostline.subsets import BUILT_INS, blocks, resolve


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


@pytest.mark.parametrize(
    ("name", "count"), [("llama", 2 * 3 + 1), ("bert", 2 * (1 + 2 * 3)), ("t5", 2 + 3 * 2 + 2 + 2)]
)
def test_norms_of_hugging_face_models(name, count):
    names = resolve("@norms", hugging_face(name))
    assert len(names) == count
    assert all("norm" in name.lower() for name in names)


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


def test_last_decoder_block_of_t5_brings_its_final_norm_only():
    t5 = hugging_face("t5")
    subset = resolve("@last:1", t5)
    assert subset == resolve("decoder.block.1,decoder.final_layer_norm", t5)
    assert "lm_head.weight is left out" in subset.matched[0].note


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
