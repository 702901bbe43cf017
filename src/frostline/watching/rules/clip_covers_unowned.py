"""``clip-covers-unowned``: clipping counts gradients that no optimizer uses, and scales the others down for them."""

from __future__ import annotations

from collections.abc import Iterator

from frostline.watching.finding import Finding, Level
from frostline.watching.record import ClipFact, ModelFact, Record
from frostline.watching.rules import Rule
from frostline.watching.steps import Steps
from frostline.watching.wording import freeze, modules_of, named, names_of, parts_of

ID = "clip-covers-unowned"
FINE = "the norm is meant to be that of the whole model."
_EPSILON = 1e-6  # torch's own


def find(record: Record, steps: Steps) -> Iterator[Finding]:
    """Calls of ``clip_grad_norm_`` whose factor would have been another without what no optimizer holds."""
    for model in record.models:
        unused = {number for number, fact in model.parameters.items() if fact.is_unused}
        clips = [clip for clip in record.clips if clip.foreign & unused and _applied(clip) < 0.99 * _due(clip)]
        if clips:
            yield _finding(record, model, clips)


def _applied(clip: ClipFact) -> float:
    return min(1.0, clip.max_norm / (clip.norm + _EPSILON))


def _due(clip: ClipFact) -> float:
    return min(1.0, clip.max_norm / (clip.owned_norm + _EPSILON))


def _finding(record: Record, model: ModelFact, clips: list[ClipFact]) -> Finding:
    worst = min(clips, key=lambda clip: _applied(clip) / _due(clip))
    foreign = frozenset().union(*(clip.foreign for clip in clips))
    facts = [fact for number, fact in model.parameters.items() if number in foreign and fact.is_unused]
    parts = parts_of(model, facts)
    optimizer = next((each for each in record.stepped), None)
    due = f"{_due(worst):.3g}" if _due(worst) < 1 else "1 (no clipping was due)"
    return Finding(
        rule=ID,
        level=Level.WRONG,
        text=f"clip_grad_norm_ counts the gradients of {named(record, model, parts)}, which no optimizer holds, and "
        "scales the trained parameters' gradients down for them.",
        place=str(worst.place or ""),
        parameters=names_of(record, model, facts),
        modules=modules_of(record, model, facts),
        evidence=(
            f"norm {worst.norm:.4g} with them, {worst.owned_norm:.4g} of what optimizers hold, limit "
            f"{worst.max_norm:.4g}: gradients were multiplied by {_applied(worst):.3g} instead of {due}",
            f"so in {len(clips)} of the calls that were inspected",
        ),
        fix=freeze(model, parts, None if optimizer is None else optimizer.place),
        fine=FINE,
    )


RULE = Rule(ID, Level.WRONG, find)
