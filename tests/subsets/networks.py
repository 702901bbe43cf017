"""Small networks to name parts of."""

from __future__ import annotations

import pytest
import torch
from torch import nn


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


def with_integers() -> nn.Module:
    """A layer whose weight is stored as integers, as quantised models keep theirs."""
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return nn.Sequential(layer, nn.Linear(4, 2))


def shared_block() -> nn.Module:
    """One block under three names."""
    block = Block(8)
    return nn.ModuleDict({"layers": nn.ModuleList([block, block, block]), "fc": nn.Linear(8, 2)})


NETWORKS = [Transformer, TiedLM, ResNet, with_integers, shared_block]

SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}


def hugging_face(name: str) -> nn.Module:
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
