"""Lending a model other tensors for a while, and putting everything back.

A trace runs the user's own forward, so whatever that forward touches must be undone: parameters, buffers
(batch-norm statistics), tensors kept as plain attributes, attributes the forward sets, hooks, modes, RNG state.
Modules are restored from a copy of their ``__dict__``, so nothing is listed by name.
"""

from __future__ import annotations

import functools
import random
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Replace = Callable[[Tensor], Tensor]
_CONTAINERS = (dict, list, set)


def _shallow(value: Any) -> Any:
    """A copy one level down, so that a container changed in place can be restored."""
    return value.copy() if isinstance(value, _CONTAINERS) else value


def _restore(value: Any, saved: Any) -> None:
    if isinstance(value, list):
        value[:] = saved
    elif isinstance(value, dict):
        value.clear()
        dict.update(value, saved)
    elif isinstance(value, set):
        value.clear()
        value.update(saved)


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore every module's attributes, and the containers in them, as they were; also after an exception."""
    saved = [
        (module, dict(module.__dict__), {k: _shallow(v) for k, v in module.__dict__.items()})
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, attributes, copies in saved:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for name, copied in copies.items():
                value = attributes[name]
                if isinstance(value, _CONTAINERS) and (
                    len(value) != len(copied) or any(a is not b for a, b in _pairs(value, copied))
                ):
                    _restore(value, copied)


def _pairs(value: Any, copied: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict):
        if value.keys() != copied.keys():
            yield None, value
        yield from ((value.get(key), copied[key]) for key in copied)
    elif isinstance(value, list):
        yield from zip(value, copied, strict=True)
    elif value != copied:
        yield None, value


def rng_state() -> tuple[Any, ...]:
    """The state of the random number generators of Python, NumPy and torch (every device in use)."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    return random.getstate(), np.random.get_state(), torch.random.get_rng_state(), cuda


def set_rng_state(state: tuple[Any, ...]) -> None:
    """Put every generator where `rng_state` found it."""
    python, numpy, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.random.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)


def let_go_of(error: BaseException) -> None:
    """Empty the frames of an error that is caught for good.

    In torch before 2.13 a checkpoint whose function failed keeps its saved-tensor hooks set for as long as they live.
    """
    traceback.clear_frames(error.__traceback__)


def undisturbed() -> AbstractContextManager[None]:
    """Random numbers that torch draws inside do not show outside, on no device in use."""
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
    context: AbstractContextManager[None] = torch.random.fork_rng(devices=range(torch.cuda.device_count() * in_use))
    return context


def is_here(device: str) -> bool:
    """Whether kernels run on a device, so that they can be asked: on the CPU, and on the accelerator that is there."""
    return device == "cpu" or torch.device(device).type in devices_here()


@functools.cache
def devices_here() -> list[str]:
    """The kinds of device on which kernels run."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ["cpu"] + ([accelerator.type] if accelerator is not None else [])


@contextmanager
def drawing_from(state: tuple[Any, ...]) -> Iterator[None]:
    """Draw random numbers as from ``state``, and leave the generators as they were."""
    before = rng_state()
    set_rng_state(state)
    try:
        yield
    finally:
        set_rng_state(before)


@contextmanager
def swapped(model: nn.Module, parameter: Replace, buffer: Replace, attribute: Replace) -> Iterator[None]:
    """Let ``model`` run on other tensors: each parameter, buffer and plain tensor attribute replaced by a callable.

    The callables must give one replacement for one tensor, so that tied weights stay tied and a module that keeps a
    second list of its weights (``nn.LSTM``) follows.
    """
    taken: list[tuple[Any, str, Tensor]] = []  # a scripted module keeps its tensors in C++: give them back one by one
    with preserved(model):
        try:
            for module in model.modules():
                for tensors, replace in ((module._parameters, parameter), (module._buffers, buffer)):
                    for name, value in list(tensors.items()):
                        if value is not None:
                            tensors[name] = replace(value)  # type: ignore[assignment]
                            taken.append((tensors, name, value))
                for name, value in list(module.__dict__.items()):
                    if name not in ("_parameters", "_buffers", "_modules"):
                        replaced = _replace_tensors(value, parameter, attribute)
                        if replaced is not value:
                            module.__dict__[name] = replaced
            yield
        finally:
            for tensors, name, value in reversed(taken):
                tensors[name] = value


def _replace_tensors(value: Any, parameter: Replace, attribute: Replace) -> Any:
    """Tensors held as plain attributes, also inside one list, tuple or dict (``nn.LSTM``'s ``_flat_weights``)."""

    def replace(tensor: Tensor) -> Tensor:
        return parameter(tensor) if isinstance(tensor, nn.Parameter) else attribute(tensor)

    if isinstance(value, Tensor):
        return replace(value)
    if type(value) in (list, tuple) and any(isinstance(item, Tensor) for item in value):
        return type(value)(replace(item) if isinstance(item, Tensor) else item for item in value)
    if type(value) is dict and any(isinstance(item, Tensor) for item in value.values()):
        return {key: replace(item) if isinstance(item, Tensor) else item for key, item in value.items()}
    return value
