"""Seeing calls that no mode of torch's shows: ``Function.apply``, ``checkpoint``, and modules being called.

``Function.apply`` is replaced in its code object, not as a class attribute: ``fn = MyFunction.apply`` stored at import
time is a bound method over the same function object, so both spellings are seen. (From torch 2.14 on it is written in
C, and an attribute is all that can be replaced.) Modules are seen by replacing ``nn.Module.__call__``: hooks would be
noticed (fused encoders give up when they find any). Threads without an active observer run torch's own code.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import nn
from torch.autograd.function import Function


class Observer(Protocol):
    """Receives the intercepted calls of its own thread."""

    def on_module(self, module: nn.Module, run: Callable[[], Any]) -> Any: ...

    def on_apply(self, cls: type, args: tuple[Any, ...], run: Callable[..., Any]) -> Any: ...

    def checkpoint_region(
        self, function: Callable[..., Any], options: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A context manager around the forward of a non-reentrant checkpoint."""

    def run_again(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What a non-reentrant checkpoint's backward is to run in place of ``function``."""


_local = threading.local()
_lock = threading.Lock()
_installed = 0

_apply = Function.__dict__["apply"]
_is_python = isinstance(_apply, classmethod)


def _of_its_own() -> Callable[..., Any]:
    if not _is_python:
        return lambda cls, *args, **kwargs: _apply.__get__(None, cls)(*args, **kwargs)
    own = _apply.__func__
    return types.FunctionType(own.__code__, own.__globals__, "apply", own.__defaults__, own.__closure__)


_torch_apply = _of_its_own()

_GENERATOR = "_checkpoint_without_reentrant_generator"  # what runs a non-reentrant checkpoint
_GENERATOR_2_14 = f"{_GENERATOR}_impl"  # ... from torch 2.14 on, which takes the arguments apart
_generator = _GENERATOR_2_14 if hasattr(torch_checkpoint, _GENERATOR_2_14) else _GENERATOR
_torch_checkpoint_generator = getattr(torch_checkpoint, _generator)


def current_observer() -> Observer | None:
    return getattr(_local, "observer", None)


def apply_observed(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``cls.apply`` as torch has it, shown to this thread's observer."""
    observer = current_observer()
    if observer is None or kwargs:
        return _torch_apply(cls, *args, **kwargs)
    return observer.on_apply(cls, args, lambda *given: _torch_apply(cls, *given))


_torch_module_call = nn.Module.__call__
_torch_has_torch_function = torch.overrides.has_torch_function


def _observed_module_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    observer = current_observer()
    if observer is None:
        return _torch_module_call(module, *args, **kwargs)
    return observer.on_module(module, lambda: _torch_module_call(module, *args, **kwargs))


def _has_torch_function_of_its_own(args: Any) -> bool:
    """Modules ask this before they take a fused path; being observed must not be the reason not to."""
    if current_observer() is None or not torch._C._len_torch_function_stack():
        return _torch_has_torch_function(args)
    with torch.overrides._pop_mode_temporarily():
        return _torch_has_torch_function(args)


class _Shadow:
    """Gives the replacement code the ``__class__`` cell that torch's own has."""

    def apply(cls, *args, **kwargs):  # type: ignore[no-untyped-def]  # noqa: N805
        __class__  # type: ignore[name-defined]  # noqa: B018
        from frostline.tracing.interception import apply_observed

        return apply_observed(cls, args, kwargs)


def _observed_checkpoint(
    fn: Callable[..., Any],
    preserve_rng_state: bool = True,
    context_fn: Any = torch_checkpoint.noop_context_fn,
    determinism_check: str = "default",
    debug: bool = False,
    early_stop: bool = True,
    *args: Any,
    **kwargs: Any,
) -> Generator[None, None, None]:
    def own(function: Callable[..., Any]) -> Generator[None, None, None]:
        given = (preserve_rng_state, context_fn, determinism_check, debug, early_stop)
        found: Generator[None, None, None] = _torch_checkpoint_generator(function, *given, *args, **kwargs)
        return found

    yield from _shown(fn, args, kwargs, context_fn, early_stop, own)


def _observed_checkpoint_2_14(
    fn: Callable[..., Any], args: Any, kwargs: Any, *,
    context_fn: Any = torch_checkpoint.noop_context_fn, early_stop: bool = True, **how: Any,
) -> Generator[None, None, None]:  # fmt: skip
    def own(function: Callable[..., Any]) -> Generator[None, None, None]:
        found: Generator[None, None, None] = _torch_checkpoint_generator(
            function, args, kwargs, context_fn=context_fn, early_stop=early_stop, **how
        )
        return found

    yield from _shown(fn, args, kwargs, context_fn, early_stop, own)


def _shown(
    fn: Callable[..., Any], args: Any, kwargs: Any, context_fn: Any, early_stop: bool,
    own: Callable[[Callable[..., Any]], Generator[None, None, None]],
) -> Generator[None, None, None]:  # fmt: skip
    """Torch's ``own`` generator for a function, shown to this thread's observer."""
    observer = current_observer()
    if observer is None:
        yield from own(fn)
        return
    chosen = torch_checkpoint._enable_checkpoint_early_stop  # set_checkpoint_early_stop() overrules the argument
    options = {"context_fn": context_fn, "early_stop": early_stop if chosen is None else chosen}
    again = own(observer.run_again(fn))
    with observer.checkpoint_region(fn, options, args, kwargs):
        yield from again


_observed = _observed_checkpoint if _generator == _GENERATOR else _observed_checkpoint_2_14


@contextmanager
def observed_by(observer: Observer | None) -> Iterator[None]:
    """Show ``observer`` (or nobody, with None) this thread's ``Function.apply`` and ``checkpoint`` calls."""
    global _installed
    before = current_observer()
    with _lock:
        _installed += 1
        if _installed == 1:
            if _is_python:
                _apply.__func__.__code__ = _Shadow.apply.__code__
            else:
                Function.apply = classmethod(_Shadow.apply)  # type: ignore[assignment, arg-type, method-assign]
            setattr(torch_checkpoint, _generator, _observed)
            nn.Module.__call__ = _observed_module_call  # type: ignore[method-assign]
            torch.overrides.has_torch_function = _has_torch_function_of_its_own
    _local.observer = observer
    try:
        yield
    finally:
        _local.observer = before
        with _lock:
            _installed -= 1
            if _installed == 0:
                if _is_python:
                    _apply.__func__.__code__ = _torch_apply.__code__
                else:
                    Function.apply = _apply  # type: ignore[method-assign]
                setattr(torch_checkpoint, _generator, _torch_checkpoint_generator)
                nn.Module.__call__ = _torch_module_call  # type: ignore[method-assign]
                torch.overrides.has_torch_function = _torch_has_torch_function


def is_reentrant_checkpoint(cls: type) -> bool:
    return issubclass(cls, torch_checkpoint.CheckpointFunction)
