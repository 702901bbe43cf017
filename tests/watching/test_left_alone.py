"""What a script may do that our looking must not break, nor change."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.watching.watching import watched, write

HEAD = """
import torch
from torch import nn

torch.manual_seed(0)
"""

STEPS = """
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    optimizer.zero_grad()
    model(inputs).pow(2).mean().backward()
    optimizer.step()
"""

HOOKS = """
model, inputs = nn.Sequential(nn.Linear(4, 3), nn.PReLU()), torch.randn(2, 4)
for parameter in model.parameters():
    parameter.register_hook(lambda gradient: gradient.clamp(-1, 1))
"""

SPARSE_GRADIENTS = """
model, inputs = nn.Sequential(nn.Embedding(8, 4, sparse=True), nn.Linear(4, 2)), torch.tensor([1, 2])
model[0].weight.register_hook(lambda gradient: gradient * 0.5)
"""


def assert_trains(folder: Path, source: str) -> None:
    """The script ends well, and everything in it was looked at."""
    seen, ended = watched(write(folder, source))
    assert (ended.code, ended.how) == (0, "end")
    assert [note for note in seen.notes if "not seen" in note] == []
    assert str(seen)


@pytest.mark.parametrize("source", [HOOKS, SPARSE_GRADIENTS], ids=["vectors", "sparse"])
def test_a_gradient_hook_may_be_on_any_parameter(tmp_path: Path, source: str) -> None:
    assert_trains(tmp_path, HEAD + source + STEPS)
