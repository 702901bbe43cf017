"""``cacheable-prefix``: a frozen part computes for the same samples what it has computed for them before."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from torch import nn

from frostline.reports.units import bytes_text, flops_text, share
from frostline.subsets.names import within
from frostline.watching.finding import Effect, Figures, Finding, Fix, Level
from frostline.watching.places import Place, expression
from frostline.watching.prefix import Prefix, prefix_of
from frostline.watching.record import Record, SamplesFact
from frostline.watching.rules import Rule
from frostline.watching.steps import Steps, TracedPass
from frostline.watching.tape import Entry, leaves
from frostline.watching.wording import before, called, count, named

ID = "cacheable-prefix"
FINE = "what would be kept does not fit, the samples are to be augmented, or the part is to be trained later."
WORTH = 0.2
"""Of the step: what need not be computed again, at least."""
AGAIN = 0.25
"""Of the samples trained on: so many had been seen in an earlier step, at least."""
DEAR = 50
"""FLOPs a byte that would be kept: what takes fewer is computed again as fast as it is read."""


def find(record: Record, steps: Steps) -> Iterator[Finding]:
    """A part that depends on nothing that changes, and samples that were trained on in more than one step."""
    usual = steps.usual()
    now = None if usual is None else usual.cost()
    if usual is None or now is None:
        return
    entries = [entry for entry in usual.fact.replay.entries if entry.is_model]  # type: ignore[union-attr]
    again = [entry for entry in entries if _comes_again(record, entry)]
    if not again:
        return
    moved = {n for _, fact in record.facts() for n in [id(fact.parameter)] if fact.moved or fact.owners}
    prefix = prefix_of(usual, moved, _changing(record, usual, [each for each in entries if each not in again]))
    if prefix is None or prefix.flops < max(WORTH * now.step_flops, DEAR * prefix.nbytes) or not prefix.nbytes:
        return
    places = _Places(record, usual, prefix)
    if places.parts:
        given = (tensor for entry in again for tensor in leaves((entry.args, entry.kwargs)))
        batch = next(tensor.shape[0] for tensor in given if tensor.dim())
        samples = record.samples[id(again[0].function)]
        yield _finding(record, usual, places, Figures.of(now), prefix, samples, -(-prefix.nbytes // batch))


def _comes_again(record: Record, entry: Entry) -> bool:
    samples = record.samples.get(id(entry.function))
    given = leaves((entry.args, entry.kwargs))
    return samples is not None and samples.share_again >= AGAIN and any(tensor.dim() for tensor in given)


def _changing(record: Record, usual: TracedPass, fresh: Sequence[Entry]) -> list[str]:
    """The modules of a trace that were given other samples each time, and those whose buffers moved."""
    names = {id(module): name for name, module in usual.trace.model.named_modules()}
    numbers = [id(entry.function) for entry in fresh]
    for model in record.models:
        owners = {buffer.name.rpartition(".")[0] for buffer in model.buffers if buffer.moved}
        numbers += [number for number, fact in model.modules.items() if fact.name in owners]
    return [names[number] for number in numbers if number in names]


class _Places:
    """Where a prefix lies: ``model``, and the largest ``parts`` of it that are all prefix, by name in the model."""

    def __init__(self, record: Record, usual: TracedPass, prefix: Prefix) -> None:
        numbers = {name: id(module) for name, module in usual.trace.model.named_modules()}
        inside = [numbers[name] for name in prefix.modules if name in numbers]
        models = [model for model in record.models if model.modules.keys() & inside]
        self.parts: list[str] = []
        if len(models) == 1:
            self.model = models[0]
            self._name = called(self.model, _place(record))
            names = {number: fact.name for number, fact in self.model.modules.items()}
            self.others = [names[numbers[name]] for name in prefix.others if numbers.get(name) in names]
            self.parts = list(dict.fromkeys(self._largest(names[number]) for number in inside if number in names))

    def _largest(self, name: str) -> str:
        while name and not any(within(other, name.rpartition(".")[0]) for other in self.others):
            name = name.rpartition(".")[0]
        return name

    def kept(self) -> tuple[str, str, str] | None:
        """Code for what is to be kept, as a name, an expression and what takes its place; None: it is no one module."""
        written = [expression(self.model.module, self._name, part) for part in self.parts]
        facts = {fact.name: fact for fact in self.model.modules.values()}
        if len(self.parts) == 1 and facts[self.parts[0]].plain:
            return "kept, frozen", f"{{}}, {written[0]}.forward", f"{written[0]}.forward = cached"
        around = self.parts[0].rpartition(".")[0]
        row = facts[around]
        if (
            type(row.module) is not nn.Sequential
            or not row.plain
            or any(p.rpartition(".")[0] != around for p in self.parts)
        ):
            return None
        rest = [self._position(around, other) for other in self.others if other != around and within(other, around)]
        end = min(rest, default=len(row.module))
        if any(self._position(around, part) >= end for part in self.parts):
            return None
        name = expression(self.model.module, self._name, around)
        return (
            "kept, frozen, rest",
            f"{{}}, {name}[:{end}], {name}[{end}:]",
            f"{name}.forward = lambda x: rest(cached(x))",
        )

    def _position(self, around: str, name: str) -> int:
        """Which of the modules in a row ``name`` is, or lies in."""
        children = list(self.model.module.get_submodule(around)._modules)
        return children.index(name.removeprefix(around).removeprefix(".").partition(".")[0])


def _finding(
    record: Record,
    usual: TracedPass,
    places: _Places,
    now: Figures,
    prefix: Prefix,
    samples: SamplesFact,
    sample_bytes: int,
) -> Finding:
    model, total, different = places.model, samples.total, samples.different
    what = named(record, model, places.parts)
    verb = "gives" if len(places.parts) == 1 else "give"
    fixed = now.skipping(prefix.flops, prefix.seconds)
    return Finding(
        rule=ID,
        level=Level.WASTE,
        text=f"{share(prefix.flops, now.step_flops)} of the step ({flops_text(prefix.flops)} of "
        f"{flops_text(now.step_flops)}) is computed again for samples that were seen before: {what} {verb} the same "
        "each time.",
        place=str(model.place or _place(record) or ""),
        parameters=(),
        modules=tuple(record.spelled(model, part) for part in places.parts),
        evidence=(
            f"{count(total, 'sample')} {'were' if total > 1 else 'was'} trained on, {different:,} of them different: "
            f"each {total / different:.1f} times, by checksums of what the model was given",
            f"no trained weight, random number or other sample is behind it; {prefix.flops:,} FLOPs a step",
            f"what the rest takes of it is {sample_bytes:,} bytes a sample, {bytes_text(sample_bytes * different)} for "
            "all that were seen",
            "keeping it pays from epoch 2 on: the first computes as now and writes it, a step of every later one is "
            f"{flops_text(fixed.step_flops)} instead of {flops_text(now.step_flops)}",
        ),
        now=now,
        fixed=fixed,
        basis=usual.basis,
        fix=_fix(record, places, what, sample_bytes),
        fine=FINE,
        effect=Effect(skips_flops=prefix.flops, skips_seconds=prefix.seconds),
    )


def _place(record: Record) -> Place | None:
    return next((each.place for each in record.stepped if each.place is not None), None)


def _fix(record: Record, places: _Places, what: str, sample_bytes: int) -> Fix:
    kept = places.kept()
    if kept is None:
        said = (
            f"Run {what} once a sample under torch.no_grad(), keep what comes out ({bytes_text(sample_bytes)} a "
            "sample), and from the second epoch on train the rest of the network on that."
        )
        code = textwrap.fill(said, 88, initial_indent="# ", subsequent_indent="# ")
        return before(_place(record), code, "before the training begins")
    code = CACHED.format(names=kept[0], values=kept[1], last=kept[2], size=bytes_text(sample_bytes))
    return before(_place(record), code, "before the training begins", places.model)


CACHED = """\
{names} = {values}

def cached(x):  # computes each sample once and keeps {size} of it
    keys = [sample.reshape(-1).view(torch.uint8).numpy().tobytes() for sample in x.cpu()]
    new = [i for i, key in enumerate(keys) if key not in kept]
    if new:
        with torch.no_grad():
            kept.update(zip([keys[i] for i in new], frozen(x[new])))
    return torch.stack([kept[key] for key in keys])

{last}"""

RULE = Rule(ID, Level.WASTE, find)
