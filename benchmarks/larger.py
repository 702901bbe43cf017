"""The networks of `benchmarks.models`, each with a batch 16 times as large: ``benchmarks/larger.py:vit`` is a TARGET.

With their own batches a large accelerator waits for Python; with these it has work to do.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from benchmarks import models
from benchmarks.models import CrossEntropy, Made

TIMES = 16


def _repeated(tensor: Tensor) -> Tensor:
    return tensor.repeat(TIMES, *[1] * (tensor.dim() - 1))


def _larger(name: str) -> Made:
    model, inputs, loss = getattr(models, name)()
    if isinstance(loss, CrossEntropy):
        loss = CrossEntropy(_repeated(loss.labels))
    return model, tree_map(_repeated, inputs), loss


def __getattr__(name: str) -> Any:
    if not name.startswith("_") and name in vars(models):
        return functools.partial(_larger, name)
    raise AttributeError(name)
