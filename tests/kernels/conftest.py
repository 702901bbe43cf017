"""`test_same_gradients` is run on the device that cases run on; the other tests count what the CPU's kernels do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.cases import DEVICE


@pytest.fixture(autouse=True)
def _there(request: pytest.FixtureRequest) -> Iterator[None]:
    if DEVICE == "cpu" or "same_gradients" not in str(request.path):
        yield
    else:
        with torch.device(DEVICE):
            yield
