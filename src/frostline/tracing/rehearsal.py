"""Running a step under the recorder, with tensors lent to the model: fake ones, or aliases of the real."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from frostline.errors import TraceError
from frostline.kernels import eager_kernels
from frostline.tracing.calls import Side, tensors_in
from frostline.tracing.environment import drawing_from, rng_state, swapped
from frostline.tracing.graph import Tape
from frostline.tracing.recorder import Recorder, let_go, recording
from frostline.tracing.step import map_tensors

_SMALL_BUFFER = 1 << 22  # elements; buffers up to this are lent by value, so that a model may look into them

Run = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Tensor]


@dataclass
class Rehearsal:
    """One model, its step, and the device asked for; `tape` runs it once under given flags.

    Attributes:
        run: ``(model, args, kwargs) -> loss``.
        parameters: the model's parameters, each once, by name.
        real: run on real tensors, because fake ones could not go through.
    """

    model: nn.Module
    run: Run
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    device: torch.device
    parameters: dict[str, nn.Parameter]
    fake_mode: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))
    real: bool = False
    rng: tuple[Any, ...] = field(default_factory=rng_state)  # every tape draws the same random numbers

    @eager_kernels()
    def tape(self, trainable: frozenset[int]) -> Tape:
        """Record one run in which exactly the parameters numbered in ``trainable`` require grad.

        Without any, nothing but the step's own code holds a tensor: when it lets go of each is recorded too.
        """
        with self.staged(trainable, keep=not self.real and bool(trainable)) as staged, ExitStack() as stack:
            recorder = staged.recorder
            if self.real:  # memory at most inference plus one op: what autograd would save is let go
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(let_go, _was_let_go))
            stack.enter_context(recording(recorder, fake=not self.real))
            loss = self.perform(staged, then=recorder.finish)
            recorder.note_deaths()
            slot = recorder.slot(loss)
        leaves = {recorder._leaf(p): number for number, p in staged.lender.numbered()}
        return Tape(recorder, slot, staged.excluded, staged.inputs, leaves, len(self.parameters), self.real)

    @contextmanager
    def staged(self, trainable: frozenset[int], *, keep: bool) -> Iterator[Staged]:
        """The model on lent tensors, and a recorder that knows what they are; afterwards all is as before.

        Args:
            trainable: the parameters, by number, that require grad.
            keep: see `Recorder`.
        """
        names = {id(module): name for name, module in self.model.named_modules()}
        recorder = Recorder(keep=keep, module_names=names, frozen=not trainable)
        lender = Lender(self, trainable)
        with drawing_from(self.rng), torch.inference_mode(False), lender.lent(), ExitStack() as stack:
            stack.callback(recorder.give_back)
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(quiet_fake_kernels())
            args, kwargs = lender.inputs()
            if not self.real:
                stack.enter_context(self.fake_mode)
            recorder.seal(iter(lender.parameters), Side.WEIGHT)
            recorder.seal(iter(lender.constants), Side.CONSTANT)
            excluded = frozenset(recorder.storage_of(t, Side.CONSTANT) for t in (*lender.parameters, *lender.buffers))
            recorder.own.update(recorder.storage_of(t, Side.CONSTANT) for t in lender.constants)
            given = list(tensors_in((args, kwargs)))
            recorder.seal(iter(given), Side.DATA)
            recorder.own.update(recorder.storage_of(t, Side.DATA) for t in given)  # (what is written is put back)
            recorder.lent.update(lender.storages)
            inputs = frozenset(recorder.storage_of(t, Side.DATA) for t in given) - excluded
            yield Staged(recorder, lender, args, kwargs, excluded, inputs)

    def perform(self, staged: Staged, then: Callable[[], None] | None = None) -> Tensor:
        """Run the step up to its loss, ``then`` what belongs to it; an error gets a note that names the module."""
        recorder = staged.recorder
        try:
            loss = self.run(self.model, staged.args, staged.kwargs)
            if then is not None:
                then()
        except Exception as error:
            where = recorder.failed[1] if recorder.failed is not None and recorder.failed[0] is error else ""
            modules = dict(self.model.named_modules())
            kind = type(modules.get(where, self.model)).__name__
            error.add_note(f"frostline: while tracing the step, in module {where or '(the model)'!r} ({kind})")
            raise
        if not isinstance(loss, Tensor):
            raise TraceError(
                f"the loss must be a scalar tensor, got {type(loss).__name__}: return it from loss= or step="
            )
        if loss.numel() != 1:
            raise TraceError(
                f"the loss must be a scalar, got shape {tuple(loss.shape)}: reduce it, for example .mean()"
            )
        if loss.is_complex():
            raise TraceError("the loss is complex, and gradients can be taken of real numbers only: return its .abs()")
        return loss

    @contextmanager
    def lending(self, replacements: dict[int, Tensor]) -> Iterator[None]:
        """Lend the model stand-ins for some parameters (by number) and unset fake tensors for the rest."""
        lender = Lender(self, frozenset(), fake=True)
        by_id = {id(p): replacements[n] for n, p in enumerate(self.parameters.values()) if n in replacements}
        lender.memo.update({key: (t, None) for key, t in by_id.items()})
        with lender.lent():
            yield


@contextmanager
def quiet_fake_kernels() -> Iterator[None]:
    """Torch logs a traceback for each fake kernel that fails; what follows from it is said elsewhere."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


class _WasLetGoError(RuntimeError):
    """A saved tensor was asked for though nothing is kept."""


def _was_let_go(_nothing: None) -> Tensor:
    raise _WasLetGoError("a step that runs backward inside itself cannot be traced by one real forward")


@dataclass
class Staged:
    """A run about to begin: the tensors lent to it, the inputs, and the storages that are nobody's to save.

    ``inputs``: the storages of the step's arguments.
    """

    recorder: Recorder
    lender: Lender
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    excluded: frozenset[int]
    inputs: frozenset[int]


class Lender:
    """Makes the stand-ins of one run: the same one for the same tensor."""

    def __init__(self, rehearsal: Rehearsal, trainable: frozenset[int], *, fake: bool | None = None) -> None:
        self.rehearsal = rehearsal
        self.fake = not rehearsal.real if fake is None else fake
        self.memo: dict[int, tuple[Tensor, Any]] = {}
        self.parameters: list[Tensor] = []
        self.buffers: list[Tensor] = []
        self.constants: list[Tensor] = []
        self.storages: dict[int, torch.UntypedStorage] = {}  # the user's own, by address
        self.trainable = trainable
        self.number = {id(p): n for n, p in enumerate(rehearsal.parameters.values())}

    def lent(self) -> Any:
        return swapped(self.rehearsal.model, self.parameter, self.buffer, self.attribute)

    def numbered(self) -> Iterator[tuple[int, Tensor]]:
        for parameter in self.rehearsal.parameters.values():
            entry = self.memo.get(id(parameter))
            if entry is not None:
                yield self.number[id(parameter)], entry[0]

    def parameter(self, tensor: Tensor) -> Tensor:
        entry = self.memo.get(id(tensor))
        if entry is None:
            trains = self.number.get(id(tensor)) in self.trainable
            data = self._empty_like(tensor) if self.fake else self._alias(tensor)
            entry = (nn.Parameter(data, requires_grad=trains), tensor)
            self.memo[id(tensor)] = entry
            self.parameters.append(entry[0])
        return entry[0]

    def buffer(self, tensor: Tensor) -> Tensor:
        return self._lend(tensor, self.buffers)

    def attribute(self, tensor: Tensor) -> Tensor:
        return self._lend(tensor, self.constants)

    def _lend(self, tensor: Tensor, kind: list[Tensor]) -> Tensor:
        entry = self.memo.get(id(tensor))
        if entry is None:
            keep_values = not self.fake or (
                tensor.device == self.rehearsal.device
                and tensor.device.type == "cpu"
                and tensor.numel() <= _SMALL_BUFFER
                and not isinstance(tensor, torch._subclasses.FakeTensor)
            )
            lent = tensor.detach().clone() if keep_values else self._empty_like(tensor)
            if tensor.requires_grad:
                lent.requires_grad_()
            entry = (lent, tensor)
            self.memo[id(tensor)] = entry
            self.constants.append(lent)
            if kind is self.buffers:
                kind.append(lent)
        return entry[0]

    def _alias(self, tensor: Tensor) -> Tensor:
        """The user's own memory, with a version counter of its own; what is written to it is undone."""
        if tensor.is_inference() or tensor.layout is not torch.strided or tensor.is_nested:
            return tensor.detach().clone()
        lent = tensor.data
        storage = lent.untyped_storage()
        self.storages[storage._cdata] = storage
        return lent

    def _empty_like(self, tensor: Tensor) -> Tensor:
        with self.rehearsal.fake_mode:
            if tensor.layout is not torch.strided:
                return torch.empty(tensor.shape, dtype=tensor.dtype, layout=tensor.layout, device=self.rehearsal.device)
            size, stride = tuple(tensor.shape), tuple(tensor.stride())
            return torch.empty_strided(size, stride, dtype=tensor.dtype, device=self.rehearsal.device)

    def inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The step's inputs on the device asked for: the user's storages, so that what shares them still does."""
        device = self.rehearsal.device

        def lend(tensor: Tensor) -> Tensor:
            entry = self.memo.get(id(tensor))
            if entry is None:
                if tensor.device == device:
                    lent = self._alias(tensor)
                elif self.fake or tensor.device.type == "meta":
                    lent = self._empty_like(tensor)
                else:
                    lent = tensor.detach().to(device, copy=True)
                if tensor.requires_grad:
                    lent.requires_grad_()
                entry = (lent, tensor)
                self.memo[id(tensor)] = entry
            return entry[0]

        return map_tensors(self.rehearsal.args, lend), map_tensors(self.rehearsal.kwargs, lend)
