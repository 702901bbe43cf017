"""The networks of `benchmarks.models` as ``torch.compile`` runs them: ``benchmarks/compiled.py:vit`` is a TARGET."""

from __future__ import annotations

import functools
from typing import Any

from benchmarks import models
from benchmarks.models import Made


def _compiled(name: str) -> Made:
    model, inputs, loss = getattr(models, name)()
    model.compile(dynamic=False)
    return model, inputs, loss


def __getattr__(name: str) -> Any:
    if not name.startswith("_") and name in vars(models):
        return functools.partial(_compiled, name)
    raise AttributeError(name)
