"""``unneeded-saved-tensors``: autograd keeps what the gradients of this subset never read."""

from __future__ import annotations

from collections.abc import Iterator

from frostline.reports.units import bytes_text, share
from frostline.watching.finding import Effect, Figures, Finding, Level
from frostline.watching.record import Record
from frostline.watching.rules import Rule
from frostline.watching.steps import Steps
from frostline.watching.wording import before, called

ID = "unneeded-saved-tensors"
FINE = "memory is no concern, or the step is short: kernels in Python cost time where steps take milliseconds."
WORTH = 0.25
LEAST = 1 << 20
"""Bytes."""


def find(record: Record, steps: Steps) -> Iterator[Finding]:
    """A step of which a part is frozen and that would keep much less within ``fl.train_only``."""
    usual = steps.usual()
    unused = {number for model in record.models for number, fact in model.parameters.items() if fact.is_unused}
    if usual is None or usual.fact.lean or usual.share_trained() == 1 or len(usual.fact.replay.models) > 1:  # type: ignore[union-attr]
        return
    now = usual.without(unused)
    if now is None or now.saved_bytes < LEAST:
        return
    fixed = usual.without(unused, "train-only")
    if fixed is None:
        return
    less = now.saved_bytes - fixed.saved_bytes
    model = next((m for m in record.models if usual.fact.reached & m.parameters.keys()), None)
    if model is None or less < LEAST or less < WORTH * now.saved_bytes:
        return
    optimizer = next(iter(record.stepped), None)
    place = None if optimizer is None else optimizer.place
    yield Finding(
        rule=ID,
        level=Level.WASTE,
        text=f"{bytes_text(less)} of the {bytes_text(now.saved_bytes)} that autograd keeps for backward "
        f"({share(less, now.saved_bytes)}) are read by no gradient that is asked for.",
        place=str(place or ""),
        parameters=(),
        modules=(),
        evidence=(
            f"{now.saved_bytes:,} bytes are held when the loss returns; {fixed.saved_bytes:,} within fl.train_only",
        ),
        now=Figures.of(now),
        fixed=Figures.of(fixed),
        basis=fixed.basis["saved_bytes"],
        fix=before(
            place,
            f"import frostline\nrun = frostline.train_only({called(model, place)})  # until run.close()",
            "before the optimizer is made",
            model,
        ),
        fine=FINE,
        effect=Effect(method="train-only"),
    )


RULE = Rule(ID, Level.WASTE, find)
