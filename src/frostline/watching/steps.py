"""The recorded steps of a record, traced: what they cost as they are, and would cost otherwise."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from frostline.costing.calibration import Calibration, recall
from frostline.costing.cost import Cost
from frostline.costing.entry import bits_of, forward_entry
from frostline.costing.optimizers import optimizer_model
from frostline.subsets import Subset
from frostline.tracing.trace import Trace, trace
from frostline.watching.finding import Effect, Figures
from frostline.watching.ranks import alone
from frostline.watching.record import PassFact, Record
from frostline.watching.tape import Replay, Together

Change = Callable[[], contextlib.AbstractContextManager[None]]


@dataclass(eq=False)
class TracedPass:
    """One recorded pass with its trace.

    Attributes:
        names: id of a parameter -> its name in the trace.
        now: the parameters that required grad, by name in the trace.
        optimizer: what steps them.
    """

    fact: PassFact
    trace: Trace
    names: dict[int, str]
    now: tuple[str, ...]
    optimizer: Any
    _costs: dict[tuple[tuple[str, ...], str], Cost | None] = field(default_factory=dict)

    def cost(self, names: Iterable[str] | None = None, method: str = "freeze") -> Cost | None:
        """What the pass costs if these parameters require grad (None: those that did); None if it cannot be said."""
        wanted = set(self.now if names is None else names)
        chosen = tuple(name for name in self.trace.parameters if name in wanted)
        if (chosen, method) not in self._costs:
            self._costs[chosen, method] = self._ask(chosen, method)
        return self._costs[chosen, method]

    def _ask(self, chosen: tuple[str, ...], method: str) -> Cost | None:
        if not chosen:
            return None
        shapes = {name: tuple(self.trace.parameters[name].shape) for name in chosen}
        with _unseen(), alone(), contextlib.suppress(Exception):
            return self.trace.cost(Subset(chosen, shapes=shapes), method, self.optimizer)
        return None

    def without(self, numbers: Iterable[int], method: str = "freeze") -> Cost | None:
        """What the pass costs if these parameters were frozen as well."""
        taken = {self.names[number] for number in numbers if number in self.names}
        return self.cost([name for name in self.now if name not in taken], method)

    def share_trained(self) -> float:
        """How much of the models' numbers trains."""
        total = sum(parameter.numel() for parameter in self.trace.parameters.values())
        return sum(self.trace.parameters[name].numel() for name in self.now) / max(total, 1)

    def prefix_flops(self) -> int | None:
        """FLOPs of the forward before anything that trains: what does not depend on a parameter that required grad.

        None where the script's own code does not run with everything frozen.
        """
        trained = bits_of(n for n, name in enumerate(self.trace.parameters) if name in set(self.now))
        with _unseen():
            try:
                units = self.trace._coster_for("freeze").evaluate(frozenset(), "freeze")[0].units
            except Exception:
                return None
        frozen = [unit for unit in units if not any(bits & trained for bits in unit.behind)]
        return sum(forward_entry(unit).forward_flops for unit in frozen)

    @property
    def basis(self) -> str:
        cost = self.cost()
        return "" if cost is None else cost.basis["step_flops"]


class Steps:
    """Traces the recorded passes of a record when they are first asked for.

    Args:
        time: take the time of their ops, as far as it is not known; else seconds are known where all timings are.
    """

    def __init__(self, record: Record, *, time: bool = False) -> None:
        self.record = record
        self.time = time
        self.notes: list[str] = []
        self._traced: dict[tuple[Any, ...], TracedPass | None] = {}  # by pass and what was changed
        self._calibrations: dict[str, Calibration] = {}

    def pass_of(self, numbers: Iterable[int]) -> TracedPass | None:
        """A recorded pass that led to one of these parameters: one of the second step if there is."""
        wanted = set(numbers)
        found = [p for p in self.record.passes if p.replay is not None and p.accumulates and wanted & p.reached]
        return self._best(found)

    def usual(self) -> TracedPass | None:
        """The pass that stands for the script's step."""
        return self._best([p for p in self.record.passes if p.replay is not None and p.accumulates])

    def _best(self, passes: list[PassFact]) -> TracedPass | None:
        later = [each for each in passes if each.step >= 1] or passes
        for each in later:
            traced = self._trace(each)
            if traced is not None:
                return traced
        return None

    def otherwise(self, usual: TracedPass, effects: Sequence[Effect]) -> Figures | None:
        """What a pass costs with all of these fixes; None if it cannot be said."""
        again = self._trace(usual.fact, *(effect.within for effect in effects if effect.within is not None))
        if again is None:
            return None
        frozen = {again.names[number] for effect in effects for number in effect.freezes if number in again.names}
        trained = [name for name in again.now if name not in frozen]
        method = "train-only" if any(effect.method == "train-only" for effect in effects) else "freeze"
        cost = again.cost([*trained, *(name for effect in effects for name in effect.trains)], method)
        if cost is None:
            return None
        figures = Figures.of(cost)
        for effect in effects:
            figures = figures.skipping(effect.skips_flops, effect.skips_seconds)
        return figures

    def _trace(self, fact: PassFact, *changes: Change) -> TracedPass | None:
        key = (id(fact), *changes)
        if key not in self._traced:
            self._traced[key] = self._run(fact, changes)
        return self._traced[key]

    def _run(self, fact: PassFact, changes: Sequence[Change]) -> TracedPass | None:
        """Trace a pass, while something of its models, or of torch, is changed."""
        replay = fact.replay
        assert replay is not None
        try:
            with _unseen(), alone(), replay.as_recorded(), contextlib.ExitStack() as changed:
                for change in changes:
                    changed.enter_context(change())
                found = traced(replay, self._called(replay.models))
                names = {id(p): name for name, p in found.parameters.items()}
                now = tuple(name for number, name in names.items() if number in replay.trainable)
                result = TracedPass(fact, found, names, now, self._optimizer())
                cost = result.cost()  # while the model is as it was
                if cost is not None:
                    self._calibrate(result, cost)
        except Exception as error:
            said = str(error).partition("\n")[0]
            self.notes.append(f"a step could not be traced ({type(error).__name__}: {said}), so it has no figures")
            return None
        return result

    def _calibrate(self, traced: TracedPass, cost: Cost) -> None:
        device = str(traced.trace.device)
        like = self._calibrations.get(device)  # (steps are compared: one machine, as fast for all of them)
        if self.time:
            traced.trace.calibrate([cost], traced.optimizer, like=like)
        else:
            recall(traced.trace, [cost], traced.optimizer, like)
        if traced.trace.calibration is not None:
            self._calibrations[device] = traced.trace.calibration

    def _optimizer(self) -> Any:
        """The class of the script's optimizer (the first that stepped), if it is torch's and steps any parameter."""
        kinds = [each.type for each in self.record.stepped]
        if not kinds or not kinds[0].__module__.startswith("torch.optim"):
            return "adamw"
        try:
            optimizer_model(kinds[0]).state_bytes(torch.zeros(1, device="cpu"))
        except Exception:  # LBFGS, and those of sparse gradients, or of matrices alone
            return "adamw"
        return kinds[0]

    def _called(self, models: tuple[object, ...]) -> list[str]:
        return called_in(self.record, models)


def called_in(record: Record, models: tuple[object, ...]) -> list[str]:
    """A name for each of several models that are traced as one: what the script calls it."""
    known = {id(model.module): model.variable or model.kind for model in record.models}
    names: list[str] = []
    for model in models:
        name = known.get(id(model), type(model).__name__)
        while name in names or not name.isidentifier() or hasattr(Together, name):
            name += "_"
        names.append(name)
    return names


def traced(replay: Replay, called: list[str]) -> Trace:
    """Trace a recorded pass, its modules being as they were recorded."""
    first, model = replay.entries[0], replay.models[0]
    if replay.is_simple:
        return trace(model, args=first.args, kwargs=first.kwargs, loss=replay.loss)
    if len(replay.models) > 1:
        model = Together(dict(zip(called, replay.models, strict=True)))
    return trace(model, step=lambda _: replay.run())


@contextlib.contextmanager
def _unseen() -> Iterator[None]:
    """The user's forward may print and warn: it has done so once already."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
