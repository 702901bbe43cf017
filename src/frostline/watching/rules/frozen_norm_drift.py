"""``frozen-norm-drift``: the running statistics of frozen norms go on moving."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm

from frostline.running.buffers import lasting_buffers, wholly_frozen
from frostline.subsets.names import join
from frostline.watching.finding import Finding, Level
from frostline.watching.record import BufferFact, ModelFact, Record
from frostline.watching.rules import Rule
from frostline.watching.steps import Steps
from frostline.watching.wording import count, named, set_eval

ID = "frozen-norm-drift"
FINE = "the statistics are meant to adapt to the new data while the weights stay (adaptive batch norm)."


def find(record: Record, steps: Steps) -> Iterator[Finding]:
    """Norms in which nothing trains, in a model that a loss comes from, and whose buffers moved."""
    used = {id(model) for each in record.passes if each.replay is not None for model in each.replay.models}
    for model in record.models:
        if id(model.module) not in used or not record.num_steps:
            continue
        trained = {number for number, fact in model.parameters.items() if fact.was_trainable or fact.moved}
        if not trained and any(fact.owners for fact in model.parameters.values()):
            continue
        drifting = list(_drifting(model, trained))
        if drifting:
            yield _finding(record, model, drifting)


def _drifting(model: ModelFact, trained: set[int]) -> Iterator[tuple[str, list[BufferFact]]]:
    buffers = {buffer.name: buffer for buffer in model.buffers}
    calls = {fact.name: fact.training for fact in model.modules.values()}
    for name, module in wholly_frozen(model.module, trained).items():
        if not calls.get(name) or not _is_norm(module):
            continue
        own = [buffers[full] for each in lasting_buffers(module) if (full := join(name, each)) in buffers]
        moved = [buffer for buffer in own if buffer.moved]
        if moved:
            yield name, moved


def _is_norm(module: nn.Module) -> bool:
    """Whether a module keeps running statistics, or a power iteration, as torch's norms do."""
    if isinstance(module, (_NormBase, _SpectralNorm)):
        return True
    return "running_mean" in module._buffers and "running_var" in module._buffers


def _finding(record: Record, model: ModelFact, drifting: list[tuple[str, list[BufferFact]]]) -> Finding:
    names = [name for name, _ in drifting]
    furthest = max((b for _, own in drifting for b in own if b.most), key=lambda b: b.most or 0, default=None)
    by = f"; {record.spelled(model, furthest.name)} by up to {furthest.most:.3g}" if furthest else ""
    moved = sum(len(own) for _, own in drifting)
    return Finding(
        rule=ID,
        level=Level.WRONG,
        text=f"{named(record, model, names)} {'is' if len(names) == 1 else 'are'} frozen, but in train mode: running "
        "statistics move with every forward, so what the frozen part computes in eval mode drifts.",
        place=str(model.place or ""),
        parameters=tuple(record.spelled(model, buffer.name) for _, own in drifting for buffer in own),
        modules=tuple(record.spelled(model, name) for name in names),
        evidence=(
            f"{count(moved, 'buffer')} of {count(len(names), 'frozen norm')} changed over "
            f"{count(record.num_steps, 'optimizer step')}{by}",
        ),
        fix=set_eval(model, names, model.place),
        fine=FINE,
    )


RULE = Rule(ID, Level.WRONG, find)
