"""``fl.fit``: the largest batch and sequence length that a memory limit allows, found without running."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from frostline.amounts import parse_bytes
from frostline.costing.cost import Cost, check_method
from frostline.errors import FitError, FrostlineError
from frostline.fitting.axes import Asked
from frostline.fitting.bounds import hints
from frostline.fitting.freezing import freezings
from frostline.fitting.resizing import MOST_REAL_BYTES, Resizer, Values
from frostline.fitting.result import Fit, FitRow, Largest
from frostline.fitting.search import largest
from frostline.fitting.sizes import Say, Sizes, said
from frostline.subsets import Subset, resolve
from frostline.tracing.trace import Trace, trace


def fit(
    model: nn.Module,
    inputs: Any,
    loss: Any = None,
    *,
    train: Any = None,
    memory: int | str,
    batch: Asked = None,
    sequence: Asked = None,
    methods: str | Sequence[str] = "freeze",
    optimizer: Any = "adamw",
    device: str | None = None,
    scratch: bool = False,
    progress: Say | None = None,
) -> Fit:
    """Find the largest batch, and the largest sequence length, whose predicted peak stays within ``memory``.

    The step is traced again at other sizes, on fake tensors: nothing is run, and nothing of that size is allocated.

    Args:
        model, inputs, loss, device: as for ``fl.trace``. Labels that the loss function brings with it (in its closure,
            its defaults, the globals it reads or a ``functools.partial``) grow with the batch.
        train: a subset (see ``frostline.subsets``), or a mapping of label to subset; by default ``requires_grad`` as
            set now.
        memory: bytes, or a text such as ``"24GiB"``.
        batch: the batch dimension of each input that has one, ``{"input_ids": 0}``, or one dimension for all. By
            default dimension 0 of every input that has as many rows as the first. Tensors of the loss: ``loss.NAME``.
        sequence: the same for the length. By default dimension 1 of the first input of integers that is (batch,
            length), and of all that share both sizes. False: only the batch is looked for.
        methods: one or several of ``freeze``, ``train-only``, ``optimizer-only`` and ``backward-inputs``.
        scratch: at the sizes found, run each distinct op alone, to know the kernels' scratch memory; then look again.
        progress: called with what is being done.

    Raises:
        FitError: no row fits, with what it needs; or no batch dimension is found.
        FrostlineError: what ``fl.trace`` and ``trace.cost`` raise.
    """
    named: Mapping[Any, Any] = train if isinstance(train, Mapping) else {None: train}
    if not named:
        raise FrostlineError("fit got no subsets")
    limit = parse_bytes(memory)
    base = trace(model, inputs, loss, device)
    found = [(label, resolve(subset, model)) for label, subset in named.items()]
    subsets = {str(subset if label is None else label): subset for label, subset in found}
    return fit_rows(
        base, loss, subsets, limit,
        batch=batch, sequence=sequence, methods=methods, optimizer=optimizer, scratch=scratch, progress=progress,
    )  # fmt: skip


def fit_rows(
    base: Trace,
    loss: Any,
    subsets: Mapping[str, Subset],
    limit: int,
    *,
    batch: Asked = None,
    sequence: Asked = None,
    methods: str | Sequence[str] = "freeze",
    optimizer: Any = "adamw",
    scratch: bool = False,
    progress: Say | None = None,
) -> Fit:
    """`fit` for what is traced already."""
    methods = (methods,) if isinstance(methods, str) else tuple(dict.fromkeys(methods))
    for method in methods:
        check_method(method, runs=True)
    sizes = Sizes(Resizer.of(base, loss, batch, sequence), optimizer, progress or _say_nothing)
    for subset in subsets.values():  # what cannot be costed is said before anything is searched
        for method in methods:
            base.cost(subset, method=method, optimizer=optimizer)
    sizes.choose_values()
    sizes.check_batch()
    longest, why, note = sizes.check_length()
    rows: list[FitRow] = []
    for label, subset in subsets.items():
        for method in methods:
            search = _Search(sizes, subset, method, limit, scratch)
            held = search.find("batch", None, "", ())
            length = None
            if sizes.resizer.length is not None:
                length = search.find("length", longest, why, hints(base.model))
            rows.append(FitRow(f"{label} by {method}" if len(methods) > 1 else label, held, length))
    if not any(row.batch.size or (row.length is not None and row.length.size) for row in rows):
        raise FitError(_nothing_fits(rows, limit))
    resizer = sizes.resizer
    notes = [*_notes(base, resizer), *([note] if note else [])]
    num_traces = 1 + len(sizes.traces) + len(sizes.errors)
    return Fit(tuple(rows), limit, resizer.batch, resizer.length, base, scratch, num_traces, tuple(notes))


def _say_nothing(_what: str) -> None:
    """Progress that nobody asked for."""


class _Search:
    """The search for one row."""

    def __init__(self, sizes: Sizes, subset: Subset, method: str, limit: int, scratch: bool) -> None:
        self.sizes = sizes
        self.subset = subset
        self.method = method
        self.limit = limit
        self.scratch = scratch

    def find(self, kind: str, most: int | None, why: str, hints: Iterable[int]) -> Largest:
        """The largest size along one axis, what holds its peak, and what freezing would buy.

        Args:
            kind: ``"batch"`` or ``"length"``.
            most, why: the largest there may be, for another reason than this limit.
        """
        held = self.sizes.resizer.most(kind)
        if held is not None and (most is None or held < most):
            most, why = held, f"inputs of more would take over {MOST_REAL_BYTES / 2**30:.0f} GiB of this machine"
        known = {n: self._peak(kind, self.sizes.cost, n) for n in self.sizes.along(kind) if most is None or n <= most}
        size = largest(partial(self._peak, kind, self.sizes.cost), self.limit, known, most, hints)
        if self.scratch and size:
            size = self._with_scratch(kind, size, most)
        return self._described(kind, size, most, why)

    def _with_scratch(self, kind: str, size: int, most: int | None) -> int:
        peak = partial(self._peak, kind, self.sizes.with_scratch)
        found = peak(size)
        if found is not None and found <= self.limit:
            return size
        beyond = {n: self._peak(kind, self.sizes.cost, n) for n in self.sizes.along(kind) if n > size}
        return largest(peak, self.limit, {**beyond, size: found}, most)

    def _peak(self, kind: str, cost_of: Callable[[Any, Subset, str], Cost | None], size: int) -> int | None:
        found = cost_of(self.sizes.size(kind, size), self.subset, self.method)
        return None if found is None else found.peak_bytes

    def _described(self, kind: str, size: int, most: int | None, why: str) -> Largest:
        sizes = self.sizes
        there = [n for n in sizes.along(kind) if sizes.size(kind, n) in sizes.traces]
        at = size or min(there)
        cost = sizes.cost(sizes.size(kind, at), self.subset, self.method)
        assert cost is not None
        beyond = self._peak(kind, sizes.cost, size + 1) if size and size != most else None
        bound = ""
        if size and beyond is None:
            bound = why if size == most else f"with {size + 1:,} the step raises {self._raised(kind, size + 1)}"
        elif not size and at > 1:
            bound = f"with {at - 1:,} the step raises {self._raised(kind, at - 1)}"
        others = [n for n in there if n > at][:1] or [n for n in there if n < at][-1:]

        def costs_at(subset: Subset) -> list[tuple[int, Cost]]:
            found = ((n, sizes.cost(sizes.size(kind, n), subset, self.method)) for n in (at, *others))
            return [(n, c) for n, c in found if c is not None]

        bought = freezings(cost, costs_at, self.limit, size, bool(size and bound))
        return Largest(kind, size, at, cost, beyond, bound, bought)

    def _raised(self, kind: str, size: int) -> str:
        error = self.sizes.errors.get(self.sizes.size(kind, size))
        return "" if error is None else said(error)


def _nothing_fits(rows: Sequence[FitRow], limit: int) -> str:
    from frostline.reports.units import bytes_text  # a later room: only words come from it

    told = []
    for row in rows:
        text = f"{row.label} needs {bytes_text(row.batch.peak_bytes)} at batch {row.batch.at:,}"
        if row.batch.freezing:
            best = row.batch.freezing[0]
            text += f" ({bytes_text(best.peak_bytes)} with {best.what} frozen too)"
        told.append(text)
    return f"nothing fits into {bytes_text(limit)}: {'; '.join(told)}"


def _notes(base: Trace, resizer: Resizer) -> list[str]:
    notes = list(base.notes)
    if base.forward == "real":
        notes.append("every size was traced by one real forward of that size")
    elif resizer.values is Values.ALL:
        notes.append("at other sizes the inputs hold the values given, repeated: without values the step is another")
    backwards = [
        name
        for name, module in base.model.named_modules()
        if getattr(module, "batch_first", True) is False and not resizer.batch.given
    ]
    if backwards:
        notes.append(
            f"{backwards[0] or 'the model'} has batch_first=False: make sure that the batch is where it was looked for"
        )
    return notes
