"""``@head``: which module turns features into outputs."""

from __future__ import annotations

import pytest
from tests.subsets.networks import BasicBlock, Block, ResNet, TiedLM, hugging_face
from torch import nn

from frostline.subsets import resolve


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


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft 0.21's own
def test_head_of_a_peft_model_is_the_copy_that_trains():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])
    model = peft.get_peft_model(hugging_face("bert"), config)
    assert [name.split(".", 3)[3] for name in resolve("@head", model)] == [
        "modules_to_save.default.weight",
        "modules_to_save.default.bias",
    ]
    assert set(resolve("@head", model)) < set(resolve("@now", model))
