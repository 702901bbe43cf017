"""Three networks small enough to check every figure on paper.

frostline cost examples/small.py:middle_layer --train 2
frostline cost examples/small.py:digits_cnn --train fc1,fc2
frostline cost examples/small.py:ten_layers --train 4 --method optimizer-only --method freeze
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Loss = Callable[[Tensor], Tensor]


def middle_layer() -> tuple[nn.Module, Tensor, Loss]:
    """Linear 10-20-10-5 with ReLU, one sample, cross entropy. The middle layer is ``2``."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 5))
    label_B = torch.tensor([3])
    return model, torch.randn(1, 10), lambda logits_BC: F.cross_entropy(logits_BC, label_B)


class DigitsCNN(nn.Module):
    """Two 3x3 convolutions and two linear layers, for 28 x 28 images of three channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.fc1 = nn.Linear(32 * 7 * 7, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(image_BCHW)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def digits_cnn() -> tuple[nn.Module, Tensor, Loss]:
    """`DigitsCNN` on one image, cross entropy."""
    torch.manual_seed(0)
    model = DigitsCNN()
    label_B = torch.tensor([7])
    return model, torch.rand(1, 3, 28, 28), lambda logits_BC: F.cross_entropy(logits_BC, label_B)


def ten_layers() -> tuple[nn.Module, Tensor, Loss]:
    """Ten linear layers of 64 features, ``0`` to ``9``, on 16 samples, squared error. The fifth is ``4``."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(10)))
    x_BI, target_BO = torch.randn(16, 64), torch.randn(16, 64)
    return model, x_BI, lambda y_BO: F.mse_loss(y_BO, target_BO)
