"""What was seen of a training script: facts, without judgement. Rules read these and nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from frostline.probing.page_faults import seconds_per_fault
from frostline.watching.places import Place
from frostline.watching.tape import Replay


@dataclass(eq=False)
class ParameterFact:
    """One parameter of a model.

    Attributes:
        name: its first name in its model. ``aliases``: every other one.
        owners: the numbers of the optimizers that hold it.
        was_trainable, was_frozen: whether it was so at any optimizer step.
        reached: how many backward passes led to it, of those that were followed.
        with_gradient: at how many optimizer steps it had a ``.grad``.
        first, last: checksums of its values when it was first seen, and at the end; None where unreadable.
    """

    name: str
    parameter: nn.Parameter
    aliases: tuple[str, ...] = ()
    owners: set[int] = field(default_factory=set)
    was_trainable: bool = False
    was_frozen: bool = False
    reached: int = 0
    with_gradient: int = 0
    first: bytes | None = None
    last: bytes | None = None

    @property
    def numel(self) -> int:
        return self.parameter.numel()

    @property
    def got_gradient(self) -> bool:
        return bool(self.reached or self.with_gradient)

    @property
    def moved(self) -> bool:
        return self.first != self.last

    @property
    def is_unused(self) -> bool:
        """Whether it got a gradient that neither an optimizer nor code by hand made use of."""
        return self.got_gradient and self.was_trainable and not self.owners and not self.moved


@dataclass(eq=False)
class BufferFact:
    """One buffer of a model, with checksums as a parameter has them."""

    name: str
    numel: int
    first: bytes | None = None
    last: bytes | None = None
    value: Tensor | None = None
    most: float | None = None

    @property
    def is_kept(self) -> bool:
        """Whether it is small enough that its first values are kept, to say by how much it moved (``most``)."""
        return 0 < self.numel <= 1 << 16

    @property
    def moved(self) -> bool:
        return self.first != self.last


@dataclass(eq=False)
class ModuleFact:
    """How a module was called, in the steps that were inspected.

    Attributes:
        with_grad, without_grad: calls with gradients enabled and disabled; within a reentrant checkpoint, and in a
            backward, neither counts.
        training: calls in train mode.
        from_trained: calls with an argument that required grad.
        checkpointed: calls inside of a reentrant checkpoint none of whose inputs required grad.
        plain: whether every call took one tensor and returned one, of as many rows.
    """

    name: str
    module: nn.Module
    with_grad: int = 0
    without_grad: int = 0
    training: int = 0
    from_trained: int = 0
    checkpointed: int = 0
    plain: bool = True


@dataclass(eq=False)
class ModelFact:
    """A model: a module that was called by itself, or the largest that holds it and has a name in the code.

    Attributes:
        variable: what the code calls it, in one word; '' if nothing names it.
        names: what it is called in each scope of the code that was seen to name it.
        calls: how often it, or a part of it, was called.
        place: where the code called it in train mode first.
        compiled: it goes through ``torch.compile``, so that its inside was not seen.
    """

    module: nn.Module
    variable: str
    parameters: dict[int, ParameterFact]
    buffers: list[BufferFact]
    modules: dict[int, ModuleFact]
    calls: int = 0
    place: Place | None = None
    compiled: bool = False
    names: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return type(self.module).__name__

    @property
    def replaced(self) -> set[int]:
        """Ids of the parameters under whose name the module has another by now."""
        own = dict(self.module.named_parameters(remove_duplicate=False))
        return {n for n, fact in self.parameters.items() if own.get(fact.name, fact.parameter) is not fact.parameter}


@dataclass(eq=False)
class OptimizerFact:
    """An optimizer: where it was made, where it steps, what it is called, what it holds, how often it stepped.

    ``optimizer`` is None for one that steps nothing of the models that are looked at: it may be freed.
    """

    number: int
    optimizer: Any
    place: Place | None
    names: dict[str, str] = field(default_factory=dict)
    step_place: Place | None = None
    steps: int = 0

    def __post_init__(self) -> None:
        self.type = type(self.optimizer)

    @property
    def kind(self) -> str:
        return self.type.__name__

    def parameters(self) -> Iterator[nn.Parameter]:
        for group in self.param_groups:
            yield from group["params"]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [] if self.optimizer is None else self.optimizer.param_groups


@dataclass(eq=False)
class PassFact:
    """One run of autograd: a ``backward``, or a call of ``torch.autograd.grad`` (``accumulates`` is then False).

    Attributes:
        step: the optimizer steps that were made before it.
        reached: ids of the models' parameters that its graph leads to, and of what else optimizers hold.
        replay: how to run it again; None where that could not be recorded, ``unrecorded`` says why.
        forced: shapes of the other leaves that it leads to and that were made inside a model's call: something there
            asked for a gradient of what nothing before it trains.
        lean: it ran within `frostline.train_only`, whose kernels keep less.
    """

    step: int
    place: Place | None
    accumulates: bool
    reached: frozenset[int]
    replay: Replay | None
    unrecorded: str = ""
    forced: tuple[tuple[int, ...], ...] = ()
    lean: bool = False


@dataclass(frozen=True)
class ClipFact:
    """A call of ``clip_grad_norm_``: the norm of all that it was given, and of what an optimizer holds."""

    place: Place | None
    max_norm: float
    norm: float
    owned_norm: float
    foreign: frozenset[int]


@dataclass(frozen=True)
class MovedFact:
    """A frozen parameter that changed during an optimizer's step."""

    parameter: int
    optimizer: int
    step: int
    most: float
    momentum: float
    gradient: bool


@dataclass(frozen=True)
class LeakFact:
    """Rows whose gradient a hook set to zero, and that moved in the optimizer's step all the same."""

    parameter: int
    optimizer: int
    masked: int
    moved: int
    rows: int
    most: float
    weight_decay: float


@dataclass(frozen=True)
class SamplesFact:
    """What a model was trained on: how many samples, each counted once a step, and how many different ones.

    Only of steps in which what is frozen in it was computed.
    """

    total: int
    different: int

    @property
    def share_again(self) -> float:
        """How much of it had been seen in an earlier step."""
        return 1 - self.different / self.total


@dataclass(frozen=True)
class WrapFact:
    """A module put into ``DistributedDataParallel``: where, and the parameters whose gradients that exchanges."""

    place: Place | None
    exchanged: frozenset[int]


@dataclass(frozen=True)
class ApartFact:
    """A parameter that ends with other values on other ranks.

    Attributes:
        ranks: those on which it is not what it is on rank 0.
        began_together: it was the same there when it was first seen.
        norm, other_norm: on rank 0, and on the first of these.
    """

    parameter: int
    ranks: tuple[int, ...]
    began_together: bool
    norm: float
    other_norm: float


@dataclass(eq=False)
class PaceFact:
    """Optimizer steps one after the other of which none was inspected: how many, what they took, their page faults."""

    steps: int = 0
    seconds: float = 0.0
    page_faults: int = 0

    def add(self, seconds: float, page_faults: int) -> None:
        self.steps += 1
        self.seconds += seconds
        self.page_faults += page_faults

    @property
    def fault_seconds(self) -> float:
        """About what a step's page faults take; 0 where no step was seen, or the system does not say."""
        return self.page_faults / max(self.steps, 1) * seconds_per_fault()


@dataclass(eq=False)
class Record:
    """Everything that was seen of one script.

    ``stray``: ids of parameters of no model that an optimizer holds and that had a gradient. ``samples``: by the id of
    the module that was called, where a sizeable part of it is frozen. ``wraps``: by the id of the module inside.
    ``apart``: what rank 0 learnt of the others' parameters. ``pace``: of all steps that were not inspected.
    """

    name: str = "the block"
    models: list[ModelFact] = field(default_factory=list)
    optimizers: list[OptimizerFact] = field(default_factory=list)
    passes: list[PassFact] = field(default_factory=list)
    clips: list[ClipFact] = field(default_factory=list)
    frozen_moves: list[MovedFact] = field(default_factory=list)
    leaks: list[LeakFact] = field(default_factory=list)
    num_passes: int = 0
    num_steps: int = 0
    checkpoint_places: Counter[Place] = field(default_factory=Counter)
    stray: set[int] = field(default_factory=set)
    samples: dict[int, SamplesFact] = field(default_factory=dict)
    rank: int = 0
    num_ranks: int = 1
    wraps: dict[int, WrapFact] = field(default_factory=dict)
    apart: list[ApartFact] = field(default_factory=list)
    pace: PaceFact = field(default_factory=PaceFact)
    notes: list[str] = field(default_factory=list)
    ended: str = ""

    @property
    def owned(self) -> dict[int, set[int]]:
        """Of every parameter that an optimizer holds, by id: the numbers of these."""
        found: dict[int, set[int]] = {}
        for each in self.optimizers:
            for parameter in each.parameters():
                found.setdefault(id(parameter), set()).add(each.number)
        return found

    def facts(self) -> Iterator[tuple[ModelFact, ParameterFact]]:
        for model in self.models:
            for fact in model.parameters.values():
                yield model, fact

    @property
    def stepped(self) -> list[OptimizerFact]:
        return [each for each in self.optimizers if each.steps]

    def spelled(self, model: ModelFact, name: str) -> str:
        """A name as the report writes it: with the model's variable in front where there are several models."""
        if name and len(self.models) < 2:
            return name
        return f"{model.variable or model.kind}.{name}" if name else model.variable or model.kind
