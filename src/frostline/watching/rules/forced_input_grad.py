"""``forced-input-grad``: something asks for the gradient of what nothing before it trains."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor, nn

from frostline.reports.units import share
from frostline.watching.finding import Effect, Figures, Finding, Level
from frostline.watching.places import is_hidden
from frostline.watching.record import ModelFact, Record
from frostline.watching.rules import Rule
from frostline.watching.steps import Steps
from frostline.watching.wording import before, called

ID = "forced-input-grad"
FINE = "that gradient is read by code of yours, or a reentrant checkpoint needs it."
WORTH = 0.05
"""Of the step: what less is not worth a word."""


def find(record: Record, steps: Steps) -> Iterator[Finding]:
    """Tensors made inside a model's call that were made to require grad, where that makes backward dearer.

    Reentrant checkpoints need it, and what the caller hands in (saliency, attacks) is the caller's.
    """
    usual = steps.usual()
    now = None if usual is None else usual.cost()
    if usual is None or now is None or not usual.fact.forced or record.checkpoint_places:
        return
    effect = Effect(within=_without_requests)
    fixed = steps.otherwise(usual, [effect])
    if fixed is None or now.step_flops - fixed.step_flops < WORTH * now.step_flops:
        return
    model = next((m for m in record.models if usual.fact.reached & m.parameters.keys()), None)
    if model is None:
        return
    shapes = ", ".join(str(list(shape)) for shape in usual.fact.forced[:3])
    wasted = now.step_flops - fixed.step_flops
    optimizer = next(iter(record.stepped), None)
    place = None if optimizer is None else optimizer.place
    yield Finding(
        rule=ID,
        level=Level.WASTE,
        text=f"a tensor made inside {model.variable or model.kind}, {shapes}, requires grad though nothing before it "
        f"trains (requires_grad_(), such as enable_input_require_grads()): {share(wasted, now.step_flops)} of the step "
        "carries the gradient there.",
        place=str(place or ""),
        parameters=(),
        modules=(),
        evidence=(
            f"{len(usual.fact.forced)} such tensors in the backward that was followed; no reentrant checkpoint ran",
            f"without it backward is {fixed.backward_flops:,} FLOPs instead of {now.backward_flops:,}",
        ),
        now=Figures.of(now),
        fixed=fixed,
        basis=usual.basis,
        fix=before(place, _code(model, called(model, place)), "before the training", model),
        fine=FINE,
        effect=effect,
    )


def _code(model: ModelFact, name: str) -> str:
    if hasattr(model.module, "disable_input_require_grads"):
        return f"{name}.disable_input_require_grads()"
    return f"# take out the requires_grad_() that {name}'s forward, or a hook of it, calls on what it computes"


@contextlib.contextmanager
def _without_requests() -> Iterator[None]:
    """``requires_grad_()``, called in the model's code or a hook of it, does nothing to what is no parameter."""
    original = torch.Tensor.requires_grad_

    def ask(tensor: Tensor, requires_grad: bool = True) -> Tensor:
        ours = is_hidden(sys._getframe(1).f_code.co_filename)
        return original(tensor, requires_grad) if ours or isinstance(tensor, nn.Parameter) else tensor

    with mock.patch.object(torch.Tensor, "requires_grad_", ask):
        yield


RULE = Rule(ID, Level.WASTE, find)
