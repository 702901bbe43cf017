"""Which blocks repeat, and so what ``@last:K`` counts."""

from __future__ import annotations

import pytest
from tests.subsets.networks import BasicBlock, Block, ResNet, Transformer, hugging_face
from torch import nn

from frostline.subsets import blocks, num_blocks, resolve


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
    model = hugging_face(name)
    assert resolve("@head", model) == resolve(head, model)
    found = blocks(model)
    assert len(found) == count
    if first:  # where ViT keeps its layers depends on the version of transformers
        assert (found[0], found[-1]) == (first, last)
    after = resolve("@last:1", model)
    assert set(resolve(found[-1], model)) <= set(after)
    assert not any("embed" in name or "shared" in name or "wte" in name for name in after)
    assert not any(name.startswith(f"{block}.") for name in after for block in found[:-1])
