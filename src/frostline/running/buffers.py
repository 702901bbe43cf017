"""Keeping the buffers of frozen modules from drifting.

Freezing a batch norm's weight does not freeze it: in train mode its running statistics go on moving, and with them what
it computes in eval mode. So does spectral norm's power iteration, or a codebook kept by a moving average. Putting
buffers back after the fact is no way out: what autograd saved of them would change under it. Instead such a module is
lent stand-ins for its buffers while it is being called, and writes to those.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from frostline.subsets.names import within


def wholly_frozen(model: nn.Module, trained: set[int]) -> dict[str, nn.Module]:
    """The modules with buffers in which nothing trains, by name.

    A module goes by its own parameters; without any, by those of the modules inside it; and where there are none either
    (a batch norm without ``affine``, a parametrization), by those of its neighbour: the last module before it that has
    parameters, or else the first after it, inside the smallest module around both.

    Args:
        trained: ``id`` of every trained parameter.
    """
    modules = dict(model.named_modules())
    own = {name: [id(p) for p in module._parameters.values() if p is not None] for name, module in modules.items()}
    return {
        name: module
        for name, module in modules.items()
        if lasting_buffers(module) and trained.isdisjoint(_decisive(name, own))
    }


def lasting_buffers(module: nn.Module) -> list[str]:
    """The buffers of its own that ``state_dict`` would save; the others are a module's cache, to renew as it likes."""
    passing = module._non_persistent_buffers_set
    return [name for name, buffer in module._buffers.items() if buffer is not None and name not in passing]


def _decisive(name: str, own: Mapping[str, list[int]]) -> list[int]:
    """The parameters that say whether module ``name`` is frozen."""
    if own[name]:
        return own[name]
    inside = [each for module, ids in own.items() if within(module, name) for each in ids]
    if inside:
        return inside
    around = name
    while around:
        around = around.rpartition(".")[0]
        order = [module for module, ids in own.items() if within(module, around) and (ids or module == name)]
        if len(order) > 1:
            at = order.index(name)
            return own[order[at - 1] if at else order[1]]
    return []


@dataclass
class _Call:
    """A module that is being called: who lends it what, for what it had, and the frames that its open calls are in."""

    guard: Guard
    module: nn.Module
    buffers: dict[str, Tensor | None]
    frames: list[FrameType | None]

    @property
    def is_torn(self) -> bool:
        """Whether it has ended without a word, as an interrupt ends it: torch's hooks are called after errors only."""
        if None in self.frames:
            return False
        running = {id(frame) for top in sys._current_frames().values() for frame in _stack(top)}
        return not any(id(frame) in running for frame in self.frames)

    def left(self, frame: FrameType | None) -> None:
        """One of its calls is over: that in ``frame``, if it is known."""
        known = [place for place, each in enumerate(self.frames) if each is frame]
        del self.frames[known[0] if known else -1]

    def end(self) -> None:
        """Give back what it had."""
        del _calls[id(self.module)]
        self.module._buffers.update(self.buffers)


_calls: dict[int, _Call] = {}  # by module: of two runs that share one, one lends
_lock = threading.RLock()


class Guard:
    """Lends every module that it watches stand-ins for its buffers, call by call.

    Calls of one module may be nested or run in several threads: they share the stand-ins, and the last one out gives
    the buffers back. The hooks get the module, so they serve the replicas of ``nn.DataParallel`` too; a deep copy or
    a pickled copy of the model carries hooks that do nothing.
    """

    def __init__(self) -> None:
        self.active = True

    def __deepcopy__(self, memo: Any) -> Guard:
        return _inert_guard()

    def __reduce__(self) -> Any:
        return _inert_guard, ()

    def watch(self, module: nn.Module, later: Callable[..., object]) -> None:
        """Put the hooks on; ``later(function)`` has them taken off at the end.

        Ours goes first: the old ``spectral_norm`` is itself a hook that writes buffers.
        """
        later(module.register_forward_pre_hook(self.before, prepend=True).remove)
        later(module.register_forward_hook(self.after, prepend=True, always_call=True).remove)
        later(module.register_state_dict_pre_hook(self.before_saving).remove)

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        with _locked():
            call = _open_call(module)
            if call is not None:
                if call.guard is self:
                    call.frames.append(_caller())
            elif self.active and module.training:  # in eval mode modules read their buffers, and autograd keeps them
                lent = {name: module._buffers[name] for name in lasting_buffers(module)}
                _calls[id(module)] = _Call(self, module, lent, [_caller()])
                module._buffers.update(_stand_ins(module, lent, args))

    def after(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        with _locked():
            call = _calls.get(id(module))
            if call is None or call.guard is not self:
                return
            call.left(_caller())
            if not call.frames:
                call.end()

    def before_saving(self, module: nn.Module, _prefix: str, _keep_vars: bool) -> None:
        """What an interrupt left lent is given back: handlers of it save the model."""
        with _locked():
            _open_call(module)

    def close(self) -> None:
        """Give back whatever is still lent: an interrupt may have torn a call."""
        with _locked():
            self.active = False
            for call in list(_calls.values()):
                if call.guard is self:
                    call.end()


def _locked() -> Any:
    return nullcontext() if torch.compiler.is_compiling() else _lock


def _open_call(module: nn.Module) -> _Call | None:
    """The call that a module is in; one that was torn is ended."""
    call = _calls.get(id(module))
    if call is None or not call.is_torn:
        return call
    call.end()
    return None


def _caller() -> FrameType | None:
    """The frame of torch that calls the module whose hook asks; none for a compiler, which has no frames."""
    if torch.compiler.is_compiling():
        return None
    calls = (frame for frame in _stack(sys._getframe(2)) if frame.f_code is _CALL)
    return next(calls, None)


_CALL = nn.Module._call_impl.__code__


def _stack(top: FrameType) -> Iterator[FrameType]:
    frame: FrameType | None = top
    while frame is not None:
        yield frame
        frame = frame.f_back


def _inert_guard() -> Guard:
    guard = Guard()
    guard.active = False
    return guard


def _stand_ins(module: nn.Module, lent: dict[str, Tensor | None], args: tuple[Any, ...]) -> dict[str, Tensor | None]:
    """What a module gets in place of its buffers: copies; nothing where it would only write to them."""
    if _only_writes(module, args):
        return dict.fromkeys(lent)
    return {name: None if buffer is None else _copy(buffer) for name, buffer in lent.items()}


def _copy(buffer: Tensor) -> Tensor:
    """A copy, made when somebody writes to it: a module may only read the buffer, and that may be large.

    Until then both are in the same memory (copy on write: c10/core/impl/COW.h), and autograd keeps no copy. That cannot
    be had for memory that torch has not allocated; and a write copies all of a storage: so not for a view of more.
    """
    if type(buffer) is Tensor and not torch.compiler.is_compiling():
        with suppress(NotImplementedError, RuntimeError):
            if buffer.untyped_storage().nbytes() == buffer.nbytes:
                return buffer._lazy_clone()
    return buffer.clone()


def _only_writes(module: nn.Module, args: tuple[Any, ...]) -> bool:
    """Whether a module is a norm of torch's, whose train mode reads no buffer: autograd would keep copies for nothing.

    Without a weight only the buffers tell it that an input has the wrong number of channels, and how precise the
    statistics are to be. A hook of the user's may read them.
    """
    if not isinstance(module, (_BatchNorm, _InstanceNorm)) or "forward" in vars(module):
        return False
    if type(module).forward not in (_BatchNorm.forward, _InstanceNorm.forward):
        return False
    given = args[0] if args else None
    if len(module._forward_pre_hooks) > 1 or not isinstance(given, Tensor):
        return False
    beside = module.weight if module.affine else given
    if any(b is not None and b.is_floating_point() and b.dtype != beside.dtype for b in module._buffers.values()):
        return False
    return module.affine or (given.dim() > 1 and given.shape[1] == module.num_features)
