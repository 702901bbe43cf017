"""Convolutional networks."""

from __future__ import annotations

import torch
from tests.cases import Case, case
from tests.zoo.dense import mean_square
from torch import Tensor, nn
from torch.nn import functional


def classify(labels: Tensor):
    return lambda logits: functional.cross_entropy(logits, labels)


@case()
def mnist_cnn() -> Case:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1568, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )
    return Case(model, torch.randn(2, 3, 28, 28), classify(torch.randint(0, 10, (2,))))


def norm_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


@case()
def batch_norm_cnn_train() -> Case:
    return Case(norm_cnn(), torch.randn(3, 3, 9, 9), classify(torch.randint(0, 4, (3,))))


@case()
def batch_norm_cnn_eval() -> Case:
    return Case(norm_cnn().eval(), torch.randn(3, 3, 9, 9), classify(torch.randint(0, 4, (3,))))


class NormAndActivation(nn.BatchNorm2d):
    """A norm with a ``forward`` of its own, as image models have them."""

    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1)
        x = functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return x.relu_()


class InstancesApart(nn.InstanceNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return functional.instance_norm(x, self.running_mean, self.running_var, self.weight, self.bias).tanh()


@case()
def norms_with_their_own_forward() -> Case:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        NormAndActivation(6),
        nn.Conv2d(6, 8, 3, stride=2),
        InstancesApart(8, affine=True, track_running_stats=True),
        NormAndActivation(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    return Case(model, torch.randn(3, 3, 9, 9), classify(torch.randint(0, 4, (3,))))


@case()
def channels_last_cnn() -> Case:
    x = torch.randn(2, 3, 9, 9).to(memory_format=torch.channels_last)
    return Case(norm_cnn().to(memory_format=torch.channels_last), x, classify(torch.randint(0, 4, (2,))))


class BasicBlock(nn.Module):
    """ResNet-18's block."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample: nn.Module | None = None
        if stride != 1 or width_in != width:
            self.downsample = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += identity
        return functional.relu(out, inplace=True)


class Bottleneck(nn.Module):
    """ResNet-50's block."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width_in, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or width_in != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(width_in, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, block: type[nn.Module], depths: list[int], width: int, expansion: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        width_in = width
        for stage, depth in enumerate(depths):
            blocks = []
            for i in range(depth):
                blocks.append(block(width_in, width << stage, 2 if stage and not i else 1))
                width_in = (width << stage) * expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(width_in, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


@case()
def resnet18() -> Case:
    return Case(ResNet(BasicBlock, [2, 2, 2, 2], 4, 1), torch.randn(2, 3, 32, 32), classify(torch.tensor([1, 7])))


@case()
def resnet50() -> Case:
    # In eval mode: at 32 x 32 the last stage is one pixel, which a train-mode batch norm refuses for one sample.
    return Case(ResNet(Bottleneck, [3, 4, 6, 3], 4, 4).eval(), torch.randn(1, 3, 32, 32), classify(torch.tensor([3])))


@case()
def depthwise_cnn() -> Case:
    def separable(a: int, b: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(a, a, 3, stride, 1, groups=a, bias=False),
            nn.BatchNorm2d(a),
            nn.ReLU6(inplace=True),
            nn.Conv2d(a, b, 1, bias=False),
            nn.BatchNorm2d(b),
            nn.ReLU6(inplace=True),
        ]

    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        *separable(8, 12, 1),
        *separable(12, 16, 2),
        nn.Conv2d(16, 16, 3, groups=4),
        nn.Flatten(),
        nn.Linear(64, 5),
    )
    return Case(model, torch.randn(2, 3, 15, 15), classify(torch.tensor([0, 4])))


class UNet(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()

        def double(a: int, b: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(2, b), nn.SiLU(), nn.Conv2d(b, b, 3, padding=1), nn.SiLU()
            )

        self.down1, self.down2, self.bottom = double(1, width), double(width, 2 * width), double(2 * width, 4 * width)
        self.up2, self.join2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2), double(4 * width, 2 * width)
        self.up1, self.join1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2), double(2 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(functional.max_pool2d(a, 2))
        c = self.bottom(functional.max_pool2d(b, 2))
        b = self.join2(torch.cat([self.up2(c), b], dim=1))
        return self.head(self.join1(torch.cat([self.up1(b), a], dim=1)))


@case()
def unet() -> Case:
    return Case(UNet(), torch.randn(1, 1, 16, 16), classify(torch.randint(0, 2, (1, 16, 16))))


@case()
def conv_1d() -> Case:
    model = nn.Sequential(
        nn.Conv1d(4, 6, 3, dilation=2),
        nn.InstanceNorm1d(6, affine=True),
        nn.GELU(),
        nn.Conv1d(6, 6, 5, padding="same", groups=2),
        nn.AvgPool1d(2),
        nn.ConvTranspose1d(6, 4, 3, stride=2, output_padding=1),
        nn.AdaptiveMaxPool1d(3),
    )
    return Case(model, torch.randn(2, 4, 20), mean_square)


@case()
def conv_3d() -> Case:
    model = nn.Sequential(
        nn.Conv3d(2, 4, 3, padding=1),
        nn.BatchNorm3d(4),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.ConvTranspose3d(4, 3, 2, stride=2),
        nn.AdaptiveAvgPool3d(2),
        nn.Flatten(),
        nn.Linear(24, 2),
    )
    return Case(model, torch.randn(1, 2, 6, 6, 6), mean_square)


@case()
def conv_paddings() -> Case:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
        nn.InstanceNorm2d(4, affine=True),
        nn.LeakyReLU(),
        nn.Conv2d(4, 4, 4, padding="same"),
        nn.ReflectionPad2d(1),
        nn.Conv2d(4, 3, 3, padding="valid", stride=(1, 2)),
        nn.ZeroPad2d(1),
        nn.Conv2d(3, 3, 3, padding=1, padding_mode="replicate"),
    )
    return Case(model, torch.randn(2, 2, 8, 8), mean_square)


class SuperResolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.PixelShuffle(2), nn.PReLU(4))
        self.exit = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        coarse = functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        y = self.exit(self.up(torch.relu(self.entry(x)))) + coarse
        return functional.interpolate(y, size=(10, 10), mode="nearest")


@case()
def pixel_shuffle_and_interpolate() -> Case:
    return Case(SuperResolution(), torch.randn(1, 3, 6, 6), mean_square)


class Unpool(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Conv2d(2, 4, 3, padding=1), nn.ConvTranspose2d(4, 2, 3, padding=1)
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y, where = self.pool(torch.relu(self.encode(x)))
        return self.decode(self.unpool(y, where))


@case()
def max_unpool() -> Case:
    return Case(Unpool(), torch.randn(2, 2, 8, 8), mean_square)
