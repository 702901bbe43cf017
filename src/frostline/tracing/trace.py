"""``fl.trace``: record one step of a model, without weights, memory or a device where that is possible."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.nn.parameter import is_lazy

from frostline.errors import FrostlineError, TraceError
from frostline.tracing.alignment import align
from frostline.tracing.calls import Call
from frostline.tracing.environment import let_go_of
from frostline.tracing.graph import Graph, Tape
from frostline.tracing.lifetimes import Lifetimes, lifetimes
from frostline.tracing.rehearsal import Rehearsal
from frostline.tracing.replaced import mark_replaced
from frostline.tracing.step import default_loss, made_up_labels, split_inputs, sum_loss, wants_labels

if TYPE_CHECKING:
    from frostline.costing.calibration import Calibration, Progress
    from frostline.costing.comparison import Comparison
    from frostline.costing.cost import Cost
    from frostline.costing.marginal import Marginal


def trace(
    model: nn.Module,
    inputs: Any = None,
    loss: Callable[[Any], Tensor] | str | None = None,
    device: str | torch.device | None = None,
    *,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    step: Callable[[nn.Module], Tensor] | None = None,
) -> Trace:
    """Record one forward and its loss; every cost of every subset follows from the record.

    Args:
        model: any eager module, real or on ``meta``. Its modes (train or eval) are taken as found; its parameters,
            buffers, flags, hooks and the random number generators are left as they were.
        inputs: tensor | tuple (positional) | mapping (keywords). Or give ``args`` and ``kwargs``.
        loss: ``callable(outputs) -> scalar``. By default ``outputs.loss``, or the outputs if they are a scalar; Hugging
            Face models without labels get made-up ones. ``"sum"``: the sum of the outputs; figures are then `assumed`.
        device: where to cost it; by default where the model is (``meta`` counts as the CPU).
        step: instead of inputs and loss: ``callable(model) -> scalar loss``.

    Raises:
        TraceError: no scalar loss; a loss that needs no gradient; a model on ``meta`` whose values decide what runs; a
            device that is not there.
        Exception: whatever the step itself raises, with a note that names the module.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if step is not None and not callable(step):
        raise TraceError(f"step must be callable(model) -> loss, got {type(step).__name__}")
    given, named = split_inputs(inputs, args, kwargs)
    if step is not None and (given or named or loss is not None):
        raise TraceError("give either step= or inputs and loss, not both")
    if step is None and not given and not named:
        raise TraceError("nothing to run: give inputs (a tensor, a tuple or a mapping), or step=")
    parameters = dict(model.named_parameters())
    _check_model(model, parameters)
    where = _device(model, parameters, device)
    assumptions: list[str] = []
    take_loss = _loss_taker(loss, assumptions)

    def run(lent: nn.Module, lent_args: Any, lent_kwargs: Any) -> Tensor:
        return take_loss(lent(*lent_args, **lent_kwargs)) if step is None else step(lent)

    rehearsal = Rehearsal(model, run, given, named, where, parameters)
    if step is None and loss is None and wants_labels(model, rehearsal.args, rehearsal.kwargs):
        rehearsal.kwargs.update(_labels(rehearsal))
        assumptions.append("labels were made up")
    return Trace(rehearsal, assumptions)


def _loss_taker(loss: Callable[[Any], Tensor] | str | None, assumptions: list[str]) -> Callable[[Any], Tensor]:
    if loss is None:
        return default_loss
    if loss == "sum":
        assumptions.append('the loss is the sum of the outputs (loss="sum")')
        return sum_loss
    if isinstance(loss, str) or not callable(loss):
        raise TraceError(f'loss must be callable(outputs) -> scalar, or "sum"; got {loss!r}')
    return loss


def _check_model(model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    lazy = [name for name, p in parameters.items() if is_lazy(p)]
    if lazy:
        raise TraceError(f"parameter {lazy[0]!r} has no shape yet (a lazy module): run one forward first")
    if not parameters:
        raise TraceError(f"{type(model).__name__} has no parameters: there is nothing to train")


def _device(model: nn.Module, parameters: dict[str, nn.Parameter], asked: str | torch.device | None) -> torch.device:
    found = {p.device for p in parameters.values()}
    if asked is None:
        real = {d for d in found if d.type != "meta"}
        if len(real) > 1:
            raise TraceError(f"the model lies on several devices ({', '.join(sorted(map(str, real)))}): say device=")
        return real.pop() if real else torch.device("cpu")
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise TraceError(f"device {asked!r}: {str(error).splitlines()[0]}") from error
    there = ["cpu"] + ([str(torch.accelerator.current_accelerator())] if torch.accelerator.is_available() else [])
    if device.type not in {torch.device(d).type for d in there}:
        raise TraceError(f"device {str(device)!r} is not here; there is: {', '.join(there)}")
    return device


def _labels(rehearsal: Rehearsal) -> dict[str, Tensor]:
    """Labels for a model that computes its own loss: shaped like what a run without labels returns."""
    seen: list[Any] = []

    def look(model: nn.Module, args: Any, kwargs: Any) -> Tensor:
        seen.append(model(*args, **kwargs))
        return torch.zeros(())

    for real in (False, True):
        if real and any(p.device.type == "meta" for p in rehearsal.parameters.values()):
            break
        try:
            replace(rehearsal, run=look, real=real).tape(frozenset())
            break
        except Exception as error:  # it may need labels to run at all, or values; the traced run says what is wrong
            let_go_of(error)
            seen.clear()
    return made_up_labels(rehearsal.model, rehearsal.kwargs, rehearsal.args, seen[-1] if seen else None)


@dataclass(repr=False)
class Trace:
    """The record of one step. `cost` answers for any subset; see DESIGN's words in ``docs/glossary.md``.

    Attributes:
        model: the traced model, unchanged.
        modes: each module's name and whether it was in train mode, as traced.
        forward: ``"fake"`` (nothing was computed) or ``"real"`` (one real forward, keeping metadata only).
        notes: what a reader of the figures should know.
        entangled: why what autograd does cannot be told call by call, so that every subset is a run of the whole step;
            '' where it can, as in nearly every model.
        lean: it answers for frostline's own kernels (`frostline.kernels`), under which a step keeps what is read alone.
    """

    rehearsal: Rehearsal
    assumptions: list[str]
    notes: list[str] = field(default_factory=list)
    lean: bool = False

    def __post_init__(self) -> None:
        self.modes = [(name, module.training) for name, module in self.model.named_modules()]
        everything = frozenset(
            n for n, p in enumerate(self.rehearsal.parameters.values()) if p.is_floating_point() or p.is_complex()
        )
        self.trainable_numbers = everything
        self.lifetimes = Lifetimes((), ())
        self.tape_on = self._first_tape(everything)
        if self.tape_on.loss is None or self.tape_on.loss.edge is None:
            raise TraceError(
                "the loss needs no gradient even with every parameter trainable: it does not depend on any parameter, "
                "or was computed under torch.no_grad() or from detached tensors"
            )
        unregistered = sum(isinstance(leaf, nn.Parameter) for leaf in self.tape_on.unknown_leaves)
        if unregistered:
            self.notes.append(
                f"{unregistered} Parameters are not the model's (made in the forward, or held where no module "
                "registers them): they always get a gradient, and are in no subset"
            )
        diverges = self._compare_with_frozen()
        if self.lean:
            mark_replaced(self.tape_on.calls)
        self.graph = Graph(self.tape_on)
        self.entangled = diverges or self.graph.entangled

    def __repr__(self) -> str:
        model = f"{type(self.model).__name__}, {len(self.parameters)} parameter tensors"
        return f"<Trace of {model}: {len(self.graph.units)} op calls, {self.forward} forward, {self.device}>"

    def _first_tape(self, everything: frozenset[int]) -> Tape:
        tape, note = self.record(everything)
        if note:
            self.notes.append(note)
            self.rehearsal.real = True
        return tape

    def record(self, trainable: frozenset[int]) -> tuple[Tape, str]:
        """Record the step with these parameters trainable: fake, or by one real forward where fake cannot go.

        Returns the tape, and why it took a real forward ('' if it did not).
        """
        rehearsal = self.rehearsal
        try:
            return rehearsal.tape(trainable), ""
        except FrostlineError:
            raise
        except Exception as error:
            if rehearsal.real:
                raise
            data_decides = isinstance(error, (DataDependentOutputException, DynamicOutputShapeException))
            data_decides = data_decides or "not supported for tensor subclasses" in str(error)  # .numpy(), .tolist()
            weightless = [name for name, p in rehearsal.parameters.items() if p.device.type == "meta"]
            if weightless and data_decides:
                where = " ".join(getattr(error, "__notes__", [])[-1:])
                raise TraceError(
                    f"values decide what this model runs ({error.args[0] if error.args else ''}; {where}), and it has "
                    f"no weights to compute them with ({weightless[0]!r} is on meta): load the weights and trace that"
                ) from error
            if weightless:
                raise
            let_go_of(error)
            tape = replace(rehearsal, real=True).tape(trainable)
            why = "values decide what runs" if data_decides else "fake tensors cannot go through it"
            if isinstance(error, UnsupportedOperatorException):
                why = "an op has no fake kernel"
            said = str(error).partition("\n")[0]
            return tape, f"traced by one real forward: {why} ({type(error).__name__}: {said})"

    def _compare_with_frozen(self) -> str:
        """Record the step again with nothing trainable; mark what differs. Returns why it cannot be aligned, or ''."""
        try:
            tape_off, _ = self.record(frozenset())
        except Exception as error:  # a step that needs gradients to run, such as a gradient penalty
            let_go_of(error)
            return f"the step does not run with everything frozen ({type(error).__name__})"
        pairs: list[tuple[Call, Call]] = []
        diverges = align(self.tape_on.calls, tape_off.calls, pairs)
        self.lifetimes = lifetimes(self.tape_on.recorder, tape_off.recorder, pairs)
        return diverges

    # -- what was traced -----------------------------------------------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        return self.rehearsal.model

    @property
    def forward(self) -> str:
        return "real" if self.rehearsal.real else "fake"

    @property
    def device(self) -> torch.device:
        return self.rehearsal.device

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return self.rehearsal.parameters

    @cached_property
    def parameter_list(self) -> list[nn.Parameter]:
        return list(self.rehearsal.parameters.values())

    @cached_property
    def parameter_numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.rehearsal.parameters)}

    @cached_property
    def optimizer_tables(self) -> dict[Any, dict[int, int]]:
        """Per optimizer: the bytes it keeps for each parameter it was asked about."""
        return {}

    @cached_property
    def gradient_bytes(self) -> list[int]:
        """Bytes of each parameter's gradient. Assumes: dense, as every op but a sparse embedding makes it."""
        return [p.numel() * p.element_size() for p in self.parameter_list]

    @cached_property
    def parameter_bytes(self) -> int:
        storages = {}
        for p in self.parameter_list:
            storage = p.untyped_storage()
            storages[storage._cdata] = storage.nbytes() if p.device.type != "meta" else p.numel() * p.element_size()
        return sum(storages.values())

    # -- what it costs -------------------------------------------------------------------------------------------------

    @cached_property
    def _coster(self) -> Any:
        from frostline.costing.engine import Engine  # a later room: the trace is its input

        return Engine(self)

    @cached_property
    def _lean(self) -> Trace:
        """The same step once more, as it runs in `frostline.train_only`."""
        found = Trace(self.rehearsal, self.assumptions, lean=True)
        if self.calibration is not None:
            found._coster.settle(self.calibration)
        return found

    @cached_property
    def _least(self) -> Any:
        from frostline.costing.engine import Engine

        return Engine(self._lean, of=self._lean._coster)

    def _coster_for(self, method: str) -> Any:
        """What answers for a subset by a method."""
        if method == "lower-bound":
            return self._least
        return (self._lean if method == "train-only" else self)._coster

    def cost(self, train: Any = None, method: str = "freeze", optimizer: Any = "adamw") -> Cost:
        """What a step costs when only ``train`` trains, arranged by ``method``.

        Args:
            train: names, globs, modules, parameters, an optimizer, a predicate ... (see ``frostline.subsets``). None:
                ``requires_grad`` as set now.
            method: ``"freeze"``, ``"optimizer-only"``, ``"backward-inputs"``, ``"train-only"`` or ``"lower-bound"``.
            optimizer: a name (``"adamw"``), a ``torch.optim`` class, or an optimizer whose settings to take.

        Raises:
            SubsetError: a pattern matches nothing, or cannot be trained.
            TraceError: the loss does not reach the subset.
            OptimizerError: an optimizer frostline cannot ask.
        """
        from frostline.costing.cost import cost

        return cost(self, train, method, optimizer)

    def calibrate(
        self,
        costs: Iterable[Cost] | None = None,
        optimizer: Any = "adamw",
        progress: Progress | None = None,
        *,
        like: Calibration | None = None,
    ) -> Calibration:
        """Time every op that a subset may need, one at a time, on this machine; afterwards costs know their seconds.

        Args:
            costs: the rows to be predicted, where only what they need is to be timed; by default any subset's. What is
                found missing later is timed when it is asked for.
            optimizer: whose steps to time.
            progress: called with how many op calls are done, and of how many.
            like: of another trace on this device, to compare with it: both then say what a machine as fast takes.

        Timings are kept on disk, at once, so that what is interrupted goes on where it stopped.
        """
        from frostline.costing.calibration import calibrate

        found = calibrate(self, None if costs is None else list(costs), optimizer, progress, like=like)
        self._coster.settle(found)
        if "_lean" in self.__dict__:
            self._lean._coster.settle(found)
        return found

    @property
    def calibration(self) -> Calibration | None:
        """What `calibrate` found; None before."""
        found: Calibration | None = self._coster.calibration
        return found

    def compare(self, train: Any = None, methods: Any = None, optimizer: Any = "adamw") -> Comparison:
        """Several methods for one subset, or several named subsets (a mapping), side by side."""
        from frostline.costing.comparison import compare_trace

        return compare_trace(self, train, methods, optimizer)

    def marginal(self, train: Any = None, method: str = "freeze", optimizer: Any = "adamw") -> Marginal:
        """What each frozen parameter would add, and what dropping each trained one would save."""
        from frostline.costing.marginal import marginal

        return marginal(self, train, method, optimizer)
