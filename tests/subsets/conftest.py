"""The two networks that most tests of this folder name parts of."""

from __future__ import annotations

import pytest
from tests.subsets.networks import Transformer
from torch import nn


@pytest.fixture
def model() -> Transformer:
    return Transformer()


@pytest.fixture
def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
