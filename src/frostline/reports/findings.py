"""What was learnt, in words with names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from frostline.costing.bound import Kept, kept
from frostline.costing.cost import Cost
from frostline.costing.marginal import Change, early_parameters, order_of_use
from frostline.errors import FrostlineError
from frostline.reports.names import summary
from frostline.reports.units import bytes_text, flops_text, ratio, share
from frostline.subsets.names import listed


@dataclass(frozen=True)
class Finding:
    """One sentence or two.

    ``kind`` is for programs: floor, reach, early, waste, bound, needed, slice, unreached, uncounted, time, note; of a
    measurement answer, failed, noise, busy.
    """

    kind: str
    text: str


def findings(rows: Sequence[tuple[str, Cost]]) -> list[Finding]:
    """What the rows of one table teach. What every figure rests on comes last."""
    costs = [cost for _, cost in rows]
    several_models = len({id(cost.trace) for cost in costs}) > 1
    found: list[Finding] = []
    if several_models:
        found.append(
            Finding(
                "shares", 'shares ("of all") are of each row\'s own model with everything trained; figures compare.'
            )
        )
    else:
        found += [*_floor(costs[0]), *_reach(rows), *_early(rows), *_waste(rows), *bound_findings(rows)]
    for label, cost in rows:
        found += [*_unreached(label, cost), *_slices(label, cost)]
    found += [*_uncounted(costs), *_times(costs), *_notes(costs)]
    return list(dict.fromkeys(found))


def reach(cost: Cost) -> str:
    """The parameter that makes backward go as far back as it does: of those with a gradient, the first one used."""
    used = order_of_use(cost)
    return used[0] if used else ""


def trained_words(cost: Cost) -> str:
    """What trains, in a few words."""
    if cost.subset.slices:
        spelled = cost.subset.spelled()
        return ", ".join(spelled[:3]) + (f" and {len(spelled) - 3} more" if len(spelled) > 3 else "")
    return summary(cost.subset.names, _trainable(cost))


def _trainable(cost: Cost) -> list[str]:
    names = list(cost.trace.parameters)
    return [names[n] for n in sorted(cost.trace.trainable_numbers)]


def _called(label: str, cost: Cost) -> str:
    """What a sentence calls a row's subset: in a table of methods the label is the method."""
    return str(cost.subset) if label == cost.method else label.removesuffix(f" by {cost.method}")


def _floor(cost: Cost) -> Iterator[Finding]:
    full = cost.full
    yield Finding(
        "floor",
        f"the floor: the forward alone is {flops_text(full.forward_flops)}, "
        f"{share(full.forward_flops, full.step_flops)} of a full step; no subset costs less.",
    )


def _reach(rows: Sequence[tuple[str, Cost]]) -> Iterator[Finding]:
    """The row in which the fewest parameters pull backward the furthest."""
    best: tuple[float, str, Cost] | None = None
    for label, cost in rows:
        few = cost.num_trained <= 0.05 * cost.num_parameters
        backward, full = cost.backward_flops, cost.full.backward_flops
        if few and cost.method == "freeze" and full and backward >= 0.25 * full:
            key = (backward / full, label, cost)
            best = key if best is None or key[0] > best[0] else best
    if best is None:
        return
    _, label, cost = best
    yield Finding(
        "reach",
        f"{_called(label, cost)} trains {share(cost.num_trained, cost.num_parameters)} of the parameters and still "
        f"pays {share(cost.backward_flops, cost.full.backward_flops)} of a full backward, "
        f"because that reaches {reach(cost)}, the first of them that the forward uses.",
    )


def _early(rows: Sequence[tuple[str, Cost]]) -> Iterator[Finding]:
    """The few early parameters of one row that cause most of its backward."""
    best: tuple[float, str, Cost, Change] | None = None
    for label, cost in rows:
        if cost.method != "freeze" or cost.trace.entangled:
            continue
        change = early_parameters(cost)
        if change is not None and change.step_flops > 0.05 * cost.step_flops:
            key = (change.step_flops / cost.step_flops, label, cost, change)
            best = key if best is None or key[0] > best[0] else best
    if best is not None:
        yield Finding("early", f"{_called(best[1], best[2])}: {early_words(best[2], best[3])}")


def early_words(cost: Cost, change: Change) -> str:
    """The sentence about a few early parameters."""
    kept = share(change.saved_bytes, cost.saved_bytes)
    return (
        f"freezing the {change.num_elements:,} numbers of {summary(change.names, _trainable(cost))} would save "
        f"{share(change.step_flops, cost.step_flops)} of the step and {kept} of the saved bytes."
    )


def _waste(rows: Sequence[tuple[str, Cost]]) -> Iterator[Finding]:
    """What handing only the subset to the optimizer would waste, for the row where it wastes most."""
    best: tuple[float, str, Cost, Cost] | None = None
    for label, cost in rows:
        if cost.method != "freeze":
            continue
        try:
            naive = cost.trace.cost(cost.subset, method="optimizer-only", optimizer=cost._optimizer)
        except FrostlineError:
            continue
        key = (naive.step_flops / max(cost.step_flops, 1), label, cost, naive)
        best = key if best is None or key[0] > best[0] else best
    if best is None:
        return
    _, label, cost, naive = best
    parts = []
    if naive.step_flops > cost.step_flops:
        parts.append(f"cost {ratio(naive.step_flops, cost.step_flops)} the FLOPs")
    if naive.saved_bytes > cost.saved_bytes:
        parts.append(f"save {bytes_text(naive.saved_bytes)} instead of {bytes_text(cost.saved_bytes)}")
    if naive.gradient_bytes > cost.gradient_bytes:
        unused = bytes_text(naive.gradient_bytes - cost.gradient_bytes)
        parts.append(f"keep {unused} of gradients that nothing uses")
    if not parts:
        return
    *most, last = parts
    listed = f"{', '.join(most)} and {last}" if most else last
    yield Finding(
        "waste",
        f"{_called(label, cost)} with only its parameters handed to the optimizer and the rest not frozen would "
        f"{listed}. So set requires_grad_(False) on the rest.",
    )


def bound_findings(rows: Sequence[tuple[str, Cost]]) -> Iterator[Finding]:
    """Where train-only keeps more than the gradients need, and why; and what most of the rest is needed for."""
    subsets = {cost.subset: (label, cost) for label, cost in rows if cost.method in ("train-only", "lower-bound")}
    most: tuple[int, str, Cost, Cost] | None = None
    for label, cost in subsets.values():
        called = _called(label, cost)
        lean = cost.trace.cost(cost.subset, "train-only", cost._optimizer)
        least = cost.trace.cost(cost.subset, "lower-bound", cost._optimizer)
        key = (lean.saved_bytes - least.saved_bytes, called, lean, least)
        most = key if most is None or key[0] > most[0] else most
    if most is None:
        return
    more, called, lean, least = most
    tensors = kept(least)
    total = f"train-only keeps {bytes_text(lean.saved_bytes)} for {called}"
    if not more:
        yield Finding("bound", f"{total}, which is the lower bound: all of it is needed, as far as can be asked.")
    else:
        beyond = _sums((one, one.nbytes - one.needed_bytes, _why_less(one)) for one in tensors)
        listed = "; ".join(f"{what}, {share(nbytes, lean.saved_bytes)}: {why}" for what, nbytes, why in beyond[:3])
        yield Finding("bound", f"{total}; the lower bound is {bytes_text(least.saved_bytes)}. Beyond it: {listed}.")
    proved = _sums((one, one.needed_bytes, "its derivative needs it") for one in tensors if one.need.is_proved)
    if proved:
        what, nbytes, why = proved[0]
        yield Finding("needed", f"most needed: {what}, {share(nbytes, lean.saved_bytes)} of what is kept: {why}.")


def _sums(parts: Iterable[tuple[Kept, int, str]]) -> list[tuple[str, int, str]]:
    """Bytes of what is kept for the same op in the same part, and why; the most first."""
    sums: dict[tuple[str, str], list[tuple[Kept, int]]] = {}
    for one, nbytes, why in parts:
        if nbytes:
            op = one.op.removeprefix("aten.").partition(".")[0]
            sums.setdefault((f"{op} {one.role}", why), []).append((one, nbytes))
    found = []
    for (what, why), those in sums.items():
        where = listed(list(dict.fromkeys(one.module or "the model itself" for one, _ in those)), 1)
        found.append((f"{what} in {where}", sum(nbytes for _, nbytes in those), why))
    return sorted(found, key=lambda part: -part[1])


def _why_less(one: Kept) -> str:
    if not one.need.bits:
        return "no gradient that is asked for changes with it"
    if one.need.bits < one.need.width:
        return f"{one.need.bits} bit{'s' * (one.need.bits > 1)} of an element would do"
    return f"all of a tensor is kept for a view of {share(one.needed_bytes, one.nbytes)} of it"


def _unreached(label: str, cost: Cost) -> Iterator[Finding]:
    if cost.unreached:
        yield Finding(
            "unreached",
            f"{label}: the loss does not reach {summary(cost.unreached, _trainable(cost))}, "
            "so it gets no gradient and no optimizer state.",
        )


def _slices(label: str, cost: Cost) -> Iterator[Finding]:
    needs = cost.slice_needs
    if needs is None:
        return
    whole = cost.num_sliced_tensor_elements
    yield Finding(
        "slice",
        f"{label}: torch pays for the whole of each sliced tensor, {whole:,} numbers for {needs.elements:,}. "
        f"The slices alone need {bytes_text(needs.gradient_bytes)} of gradients and "
        f"{bytes_text(needs.optimizer_bytes)} of optimizer state.",
    )


def _uncounted(costs: Sequence[Cost]) -> Iterator[Finding]:
    modules: dict[str, dict[str, None]] = {}
    for cost in costs:
        for op, where in cost.uncounted.items():
            modules.setdefault(op, {}).update(dict.fromkeys(where))
    places: dict[str, list[str]] = {}
    for op, found in modules.items():
        first = next((module for module in found if module), "the model itself")
        places.setdefault(f"{first}{f' and {len(found) - 1} more' if len(found) > 1 else ''}", []).append(op)
    for place, ops in places.items():
        has, its, it = ("have", "their", "them") if len(ops) > 1 else ("has", "its", "it")
        yield Finding(
            "uncounted",
            f"uncounted: {', '.join(ops)} (in {place}) {has} no FLOP formula, so {its} FLOPs are in no total; "
            f"fl.register_flops gives {it} one.",
        )


def _times(costs: Sequence[Cost]) -> Iterator[Finding]:
    """What the seconds hold for, and what is not in them."""
    for trace in {id(cost.trace): cost.trace for cost in costs}.values():
        calibration = trace.calibration
        if calibration is None:
            continue
        threads = f", {calibration.num_threads} thread{'s' if calibration.num_threads > 1 else ''}"
        where = f"{calibration.device}{threads if calibration.device == 'cpu' else ''}"
        yield Finding("time", f"time: each distinct op was timed alone on {where}; no step was run.")
        for op, why in calibration.failed.items():
            yield Finding("time", f"untimed: {op} ({why}), so its seconds are in no figure.")
        for note in calibration.notes:
            yield Finding("time", f"note: {note}.")


def _notes(costs: Sequence[Cost]) -> Iterator[Finding]:
    for basis in dict.fromkeys(basis for cost in costs for basis in cost.basis.values()):
        word, _, what = basis.partition(": ")
        if what:
            yield Finding("basis", f"{word}: {what}.")
    for note in dict.fromkeys(note for cost in costs for note in cost.notes):
        yield Finding("note", f"note: {note}.")
