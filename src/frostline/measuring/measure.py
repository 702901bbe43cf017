"""``fl.measure``: really run rows of subset and method, beside what was predicted for them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from frostline.costing.cost import Cost, check_method
from frostline.errors import FrostlineError, TraceError
from frostline.measuring import pickled
from frostline.measuring.case import Case, Source
from frostline.measuring.measurement import MeasuredRow, Measurement
from frostline.measuring.rounds import Progress, measure_cases
from frostline.probing.timings import Reference
from frostline.subsets import Subset, resolve
from frostline.targets import load
from frostline.tracing.trace import Trace, trace

QUESTION = ("optimizer-only", "freeze")
"""The methods when none is asked for: does it help to freeze what the optimizer does not own anyway?"""


def measure(
    target: nn.Module | str,
    inputs: Any = None,
    loss: Any = None,
    *,
    train: Any,
    methods: str | Sequence[str] | None = None,
    optimizer: str = "adamw",
    repeats: int | None = None,
    threads: int | None = None,
    device: str | None = None,
    eval_mode: bool | None = None,
    model_class: str | None = None,
    predict: bool = True,
    progress: Progress | None = None,
) -> Measurement:
    """Run each subset by each method in a fresh process, turn by turn, beside full training run twice.

    Args:
        target: a model, or a TARGET of the command line (``"file.py:name"`` ...).
        inputs, loss: as for ``fl.trace``; they are sent to other processes, so a loss must be a function that can be
            imported, no lambda. With a TARGET: inputs are shapes as for ``--input``, the loss is None or ``"sum"``.
        train: a subset (see ``frostline.subsets``), or a mapping of label to subset.
        methods: by default ``optimizer-only`` and ``freeze``.
        optimizer: the name of a class of ``torch.optim``; run with a learning rate of 0.
        repeats: turns of each row; by default as many as fit in a minute or so, from 5 to 25.
        threads: of torch's operators; by default as many as this process uses.
        device: where to run; by default where the model is.
        eval_mode: by default a TARGET runs in train mode, and a model in the modes it is in.
        model_class: for a TARGET that is a config.json.
        predict: time the trace's probes (``trace.calibrate``), so that seconds are predicted too.
        progress: called with what is being done, how much is done, and of how much.

    Every process holds a copy of the model, and all of them are there at the same time.

    Raises:
        FrostlineError: the model cannot be sent to another process, or no row could be run; and what ``fl.trace`` and
            ``trace.cost`` raise. A row that fails beside others is named in its ``error``.
    """
    if isinstance(target, str):
        texts = (inputs,) if isinstance(inputs, str) else tuple(inputs or ())
        source = Source(target, texts, model_class, loss, eval_mode=bool(eval_mode), device=device)
        found = load(target, texts, model_class, loss)
        model, inputs, loss = found.model, found.inputs, found.loss
        eval_mode = bool(eval_mode)
    else:
        source = Source(eval_mode=eval_mode, device=device)
        model = target
    with _modes(model, eval_mode):
        traced = trace(model, inputs, loss, device)
    subsets = _named(train, model)
    with tempfile.TemporaryDirectory() as folder:
        if not source.target:
            source = replace(source, file=str(Path(folder) / "step.pt"))
            pickled.write(Path(source.file), model, inputs, loss)
        return measure_rows(
            source, traced, subsets, methods,
            optimizer=optimizer, repeats=repeats, threads=threads, predict=predict, progress=progress,
        )  # fmt: skip


def measure_rows(
    source: Source,
    traced: Trace,
    subsets: Mapping[str, Subset],
    methods: str | Sequence[str] | None = None,
    *,
    optimizer: str = "adamw",
    repeats: int | None = None,
    threads: int | None = None,
    predict: bool = True,
    progress: Progress | None = None,
) -> Measurement:
    """`measure` for what is traced already: ``source`` must give the workers the model that ``traced`` is of."""
    if not isinstance(optimizer, str):
        raise FrostlineError("measure takes an optimizer by its name in torch.optim, which other processes know too")
    methods = (methods,) if isinstance(methods, str) else tuple(dict.fromkeys(methods or QUESTION))
    for method in methods:
        check_method(method, runs=True)
    threads = threads or torch.get_num_threads()
    notes: list[str] = []
    rows = _rows(traced, subsets, methods, optimizer, notes)
    if predict:
        notes += _predict_seconds(traced, [cost for _, cost in rows], optimizer, threads, progress)
    cases = [Case.of(cost.subset, cost.method, optimizer) for _, cost in rows]
    calibration = getattr(traced, "calibration", None)
    reference = timed_at = None
    if calibration is not None and traced.device.type == "cpu":
        reference, timed_at = Reference(traced.device), calibration.reference_seconds
    with _threads(threads):
        outcomes = measure_cases(
            source, [*cases, cases[-1]], rounds=repeats, threads=threads, reference=reference, progress=progress
        )
    found = tuple(
        MeasuredRow(label, cost, outcome.measured, outcome.error, outcome.detail)
        for (label, cost), outcome in zip(rows, outcomes, strict=False)
    )
    if all(row.measured is None for row in found):
        raise FrostlineError(f"no row could be run: {found[-1].error}") from RuntimeError(found[-1].detail)
    rounds = max(len(row.measured.turns) for row in found if row.measured is not None)
    return Measurement(found, outcomes[-1].measured, rounds, threads, traced, tuple(notes), timed_at)


def _predict_seconds(
    traced: Trace, costs: list[Cost], optimizer: str, threads: int, progress: Progress | None
) -> list[str]:
    """Time the probes of these rows, on as many threads as the workers have; what is to say about the timings."""
    calibrate = getattr(traced, "calibrate", None)
    if calibrate is None:
        return []

    def say(done: int, total: int) -> None:
        if progress is not None:
            progress("timing ops", done, total)

    with _threads(threads):
        found = calibrate(costs, optimizer, say)
        for cost in costs:
            _ = cost.step_seconds  # what it still misses is timed here, not later on another number of threads
    return list(found.notes)


def _rows(
    traced: Trace, subsets: Mapping[str, Subset], methods: Sequence[str], optimizer: str, notes: list[str]
) -> list[tuple[str, Cost]]:
    """The rows to run, full training last; a subset that the loss does not reach is left out with a note."""
    full = traced.cost("@all", method="freeze", optimizer=optimizer)
    rows: list[tuple[str, Cost]] = []
    name = "@all"
    for label, subset in subsets.items():
        if subset == full.subset:  # the methods differ in what they do with the rest, and there is none
            name = label
            continue
        try:
            costs = [traced.cost(subset, method=method, optimizer=optimizer) for method in methods]
        except TraceError as error:
            notes.append(f"no row {label}: {error}")
            continue
        rows += [(f"{label} by {c.method}" if len(methods) > 1 else label, c) for c in costs]
    if not rows and notes:
        raise TraceError("; ".join(notes))
    return [*rows, (name, full)]


def _named(train: Any, model: nn.Module) -> dict[str, Subset]:
    if isinstance(train, Mapping):
        if not train:
            raise FrostlineError("measure got no subsets")
        return {str(label): resolve(patterns, model) for label, patterns in train.items()}
    subset = resolve(train, model)
    return {str(subset): subset}


@contextmanager
def _modes(model: nn.Module, eval_mode: bool | None) -> Iterator[None]:
    """The model in eval mode, in train mode, or (None) as it is; afterwards every module is as before."""
    before = [(module, module.training) for module in model.modules()]
    try:
        if eval_mode is not None:
            model.train(not eval_mode)
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Torch's operators on this many threads, as the workers have."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
