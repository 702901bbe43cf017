"""What an optimizer keeps: asked of torch's own class, on tensors without memory."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.optim.optimizer as torch_optimizer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from frostline.errors import OptimizerError
from frostline.probing.attribution import RanOp, Recording
from frostline.probing.stopwatch import Stopwatch, Timing
from frostline.probing.timings import Timings
from frostline.tracing.calls import TensorMeta, describe, is_view
from frostline.tracing.stand_ins import stand_in


def known() -> dict[str, type[torch.optim.Optimizer]]:
    """Every optimizer class of ``torch.optim``, by lower-case name."""
    found = {
        name.lower(): value
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    return found


class SparseGradientsRefused(OptimizerError):  # noqa: N818  an answer, not a mistake
    """The optimizer does not take sparse gradients."""


class OptimizerModel:
    """Bytes of state that one optimizer keeps for a parameter, once it has stepped.

    Args:
        optimizer: a name in ``torch.optim`` (any case), an Optimizer class, a callable ``(params) -> Optimizer`` such
            as a partial, or an Optimizer whose class and settings are taken.

    Raises:
        OptimizerError: the name is unknown, or the optimizer cannot be asked on tensors without values (LBFGS).
    """

    def __init__(self, optimizer: Any) -> None:
        if isinstance(optimizer, str):
            classes = known()
            if optimizer.lower() not in classes:
                import difflib

                close = difflib.get_close_matches(optimizer.lower(), classes, n=5, cutoff=0.4)
                hint = f"closest: {', '.join(close)}" if close else f"torch.optim has {', '.join(sorted(classes))}"
                raise OptimizerError(f"no optimizer {optimizer!r} in torch.optim; {hint}")
            make: Any = classes[optimizer.lower()]
        elif isinstance(optimizer, torch.optim.Optimizer):
            settings = {
                k: v for k, v in optimizer.defaults.items() if k in inspect.signature(type(optimizer)).parameters
            }
            make = functools.partial(type(optimizer), **settings)
        elif callable(optimizer):
            make = optimizer
        else:
            raise OptimizerError(f"optimizer must be a name, a class or an Optimizer, got {type(optimizer).__name__}")
        base = make.func if isinstance(make, functools.partial) else make
        self.name = getattr(base, "__name__", str(base))
        if isinstance(base, type) and issubclass(base, torch.optim.LBFGS):
            raise OptimizerError("LBFGS keeps a history that depends on how the run goes: its state has no fixed size")
        self._make = make
        self._known: dict[tuple[TensorMeta, bool], int] = {}
        self._steps: dict[TensorMeta, tuple[RanOp, ...]] = {}
        self._scratches: dict[TensorMeta, tuple[int, int]] = {}

    def state_bytes(self, parameter: Tensor, *, sparse: bool = False) -> int:
        """Bytes of state for one parameter after a step (step counts included)."""
        meta = _on_a_device(describe(parameter))
        key = (meta, sparse)
        if key not in self._known:
            self._known[key] = self._ask(meta, sparse)
        return self._known[key]

    def step_ops(self, parameter: Tensor) -> tuple[RanOp, ...]:
        """What a step runs for one parameter, once its state exists."""
        return self._ops_of(_on_a_device(describe(parameter)))

    def _ops_of(self, meta: TensorMeta) -> tuple[RanOp, ...]:
        if meta not in self._steps:
            self._steps[meta] = self._ask_step([meta])
        return self._steps[meta]

    def num_temporaries(self, parameter: Tensor) -> int:
        """How many tensors as large as the parameter a step makes for it and lets go again."""
        size = parameter.numel() * parameter.element_size()
        made = [op for op in self.step_ops(parameter) if not op.op._schema.is_mutable and not is_view(op.op)]
        return sum(meta is not None and meta.nbytes == size for op in made for meta in op.outputs)

    def scratch_bytes(self, parameters: Sequence[Tensor], device: torch.device | None = None) -> int:
        """The most bytes that a step takes beside parameters, gradients and state.

        Asked for one parameter, and for two alike. If two need twice as much, they are taken together (``foreach``),
        and all add up. Else one comes after the other (``for``), and what two need more than one is what the first
        leaves behind until the next has its own: variables of a loop live on. Assumes: parameters are stepped in the
        model's order, and the same is left behind whatever comes next (so it is for Adam's kin and SGD).

        Args:
            device: where they are when they train; by default where they are now.
        """
        asked = [self._scratch_of(parameter, device) for parameter in parameters]
        if any(own and left >= own for own, left in asked):
            return sum(own for own, _ in asked)
        left_behind = [0, *(left for _, left in asked)]
        return max((own + left for (own, _), left in zip(asked, left_behind, strict=False)), default=0)

    def _scratch_of(self, parameter: Tensor, device: torch.device | None) -> tuple[int, int]:
        """Bytes for one parameter alone, and how many more for two alike."""
        meta = _on_a_device(describe(parameter))
        if device is not None:
            meta = replace(meta, device=str(device))
        found = self._scratches.get(meta)
        if found is None:
            own = max((op.alive for op in self._ops_of(meta)), default=0)
            both = max((op.alive for op in self._ask_step([meta, meta])), default=0) if own else 0
            found = self._scratches[meta] = (own, both - own)
        return found

    def step_timing(self, parameter: Tensor, timings: Timings, zeros: float = 0.0) -> Timing:
        """How long a step takes for one parameter: really run, on several of its shape one after the other.

        A large one is timed by part of its rows, and taken to take longer by its size.

        Args:
            zeros: the share of the gradient that is zeros, and always was.
        """
        whole = replace(describe(parameter), device=str(timings.device))
        found = self._step_timing(whole, timings, _GRADIENT)
        if zeros < _FEW_ZEROS or found.failure:
            return found
        nothing = self._step_timing(whole, timings, 0.0)
        return replace(found, seconds=found.seconds + zeros * (nothing.seconds - found.seconds))

    def _step_timing(self, whole: TensorMeta, timings: Timings, gradient: float) -> Timing:
        meta = _part(whole)
        plain = isinstance(self._make, type) and self._make.__module__.startswith("torch.")
        key = f"step of {self.name if plain else id(self._make)} {meta!r} by {gradient}"
        found = timings.get_other(key, lambda stopwatch: self._time_step(meta, gradient, stopwatch), lasting=plain)
        factor = whole.numel / max(meta.numel, 1)
        return replace(found, seconds=found.seconds * factor, spread=found.spread * factor)

    def _time_step(self, meta: TensorMeta, gradient: float, stopwatch: Stopwatch) -> Timing:
        count = max(1, min(_AT_A_TIME, _STEPPED_BYTES // max(meta.nbytes, 1)))
        parameters = [nn.Parameter(stand_in(meta, real=True)) for _ in range(count)]
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter.data, gradient)
        with torch.enable_grad():
            optimizer = self._make(parameters)
            optimizer.step()
            return stopwatch.time_call(optimizer.step, count)

    def _ask_step(self, metas: Sequence[TensorMeta]) -> tuple[RanOp, ...]:
        recording = Recording()
        with FakeTensorMode(), recording, warnings.catch_warnings(), _as_if_real():
            warnings.simplefilter("ignore")
            parameters = [
                nn.Parameter(torch.empty_strided(m.shape, m.stride, dtype=m.dtype, device=m.device)) for m in metas
            ]
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter.data)
            try:
                optimizer = self._make(parameters)
                optimizer.step()
                recording.count_anew()
                recording.listening = True
                optimizer.step()
            except Exception as error:
                raise OptimizerError(f"{self.name} could not be asked what its step runs: {error}") from error
            recording.listening = False
            return recording.take()

    def _ask(self, meta: TensorMeta, sparse: bool) -> int:
        with FakeTensorMode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = torch.empty_strided(meta.shape, meta.stride, dtype=meta.dtype, device=meta.device)
            parameter = nn.Parameter(data)
            parameter.grad = _sparse_like(data) if sparse else torch.empty_like(data)
            try:
                optimizer = self._make([parameter])
                optimizer.step()
            except Exception as error:
                if "sparse" in str(error).lower():
                    raise SparseGradientsRefused(
                        f"{self.name} refuses sparse gradients; SparseAdam takes them"
                    ) from error
                raise OptimizerError(
                    f"{self.name} could not be asked what it keeps for a parameter of shape {meta.shape} and "
                    f"{meta.dtype}: {error}"
                ) from error
            tensors = [t for state in optimizer.state.values() for t in _tensors(state)]
            return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())


def _as_if_real() -> AbstractContextManager[Any]:
    """On accelerators optimizers take parameters together (``foreach``) if these are of types that they know."""
    known: list[Any] = torch_optimizer._foreach_supported_types
    return mock.patch.object(torch_optimizer, "_foreach_supported_types", [*known, FakeTensor])


_GRADIENT = 1e-3  # every element of it, in a timed step
_FEW_ZEROS = 0.05  # a share of them that makes no difference
_AT_A_TIME = 128  # parameters in one timed step
_STEPPED_BYTES = 32 << 20  # ... and their bytes; with gradients and state more than the caches hold
_LARGE = 64 << 20  # bytes; from 32 MiB on every temporary is fresh memory, which takes its own time


def _part(meta: TensorMeta) -> TensorMeta:
    """As many rows as are not too large; the whole, if it is not."""
    if meta.nbytes <= _LARGE or not meta.shape or meta.shape[0] < 2:
        return meta
    rows = max(1, meta.shape[0] * _LARGE // meta.nbytes)
    return replace(meta, shape=(rows, *meta.shape[1:]))


def _on_a_device(meta: TensorMeta) -> TensorMeta:
    return replace(meta, device="cpu") if meta.device == "meta" else meta


def _sparse_like(data: Tensor) -> Tensor:
    """A sparse gradient for one row, as an embedding with ``sparse=True`` makes them."""
    indices = torch.empty((1, 1), dtype=torch.int64, device=data.device)
    return torch.sparse_coo_tensor(indices, data.new_empty((1, *data.shape[1:])), data.shape, is_coalesced=True)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for item in value.values() for t in _tensors(item)]
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in _tensors(item)]
    return []


_models: dict[Any, OptimizerModel] = {}


def optimizer_model(optimizer: Any) -> OptimizerModel:
    """The model of ``optimizer``, remembered for names and classes."""
    if isinstance(optimizer, (str, type)):
        if optimizer not in _models:
            _models[optimizer] = OptimizerModel(optimizer)
        return _models[optimizer]
    return OptimizerModel(optimizer)
