"""Replacing the autograd kernels of a few ops, for the runs that ask for it and the thread of control inside them.

A replaced kernel is process-wide. It goes on to torch's own at once unless a run is open in the thread of control that
calls it: the thread that opened it, and those in which autograd's engine works for a backward started there.

Registering and taking away kernels is not safe while another thread runs the same op (tried: the other thread crashes).
So they are put in by the first run, and taken away when the last one ends only if no other thread is running Python
code then; if one is, they stay in, and only ask whether a run is open, until a run ends that finds itself alone.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef

from .holding import Holder, collected, live_holders, look_again, look_at_all, waiting
from .leaving_out import LeaveOut, hooks_disabled, leave_out, users_hooks
from .unseen import aside, transforming

_TLS = "frostline.kernels"  # torch carries objects stashed under a name to the engine's threads
_KEYS = {"AutogradCPU": DispatchKey.AutogradCPU, "AutogradCUDA": DispatchKey.AutogradCUDA}
_OWN = DispatchKeySet(DispatchKey.AutogradOther)  # where torch's own kernel for all devices is still found
_OF_DENSE = functools.reduce(
    lambda keys, key: keys.add(key),
    (DispatchKey.CPU, DispatchKey.CUDA, DispatchKey.ADInplaceOrView, DispatchKey.AutogradCPU, DispatchKey.AutogradCUDA),
    _OWN,
)

Rule = Callable[..., Any]
_rules: dict[str, Rule] = {}  # by op
_leave_out: set[Rule] = set()  # those of `leaves_out`
_lock = threading.Lock()
_num_open = 0
_library: torch.library.Library | None = None


class NotCoveredError(Exception):
    """Raised by a rule: this case runs by torch's own kernel, which keeps more than is read."""


@dataclass(frozen=True, slots=True)
class Op:
    """An op as rules get it.

    Attributes:
        call: runs it.
        is_in_place: whether it writes to its input.
        name: in ``aten``.
    """

    call: Callable[..., Any]
    is_in_place: bool
    name: str


def replaces(*names: str) -> Callable[[Rule], Rule]:
    """Register what ops of ``aten`` do instead.

    A rule is called with the run, the op and all its arguments. It returns the op's result, or `NotImplemented` where
    torch's own kernel keeps no more than is read.
    """

    def register(rule: Rule) -> Rule:
        _rules.update(dict.fromkeys(names, rule))
        return rule

    return register


def leaves_out(*names: str) -> Callable[[Rule], Rule]:
    """Register what the nodes that torch makes for ops of ``aten`` need not save.

    A rule is called with the op's first arguments, as many as it takes, and returns the names of those of its tensors
    that no asked gradient reads.
    """

    def register(rule: Rule) -> Rule:
        _leave_out.add(rule)
        return replaces(*names)(rule)

    return register


class LeanKernels:
    """A run of lean kernels in this thread of control: open from ``__enter__`` to ``close``.

    Attributes:
        fallbacks: op -> why torch's own kernel ran though it keeps more than is read -> how often.
        num_replaced: how many ops ran otherwise than torch runs them.
        bits: the storages of bits that nodes save, which no mode sees; None unless somebody asks for them.
    """

    def __init__(self) -> None:
        self.fallbacks: dict[str, Counter[str]] = {}
        self.num_replaced = 0
        self.bits: list[StorageWeakRef] | None = None
        self.is_open = False
        self._outer: LeanKernels | None = None

    def __enter__(self) -> LeanKernels:
        assert not self.is_open
        _install()
        self._outer = _current()
        self.is_open = True
        _stash(self)
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the run; other runs go on."""
        if self.is_open:
            look_at_all()
            self.is_open = False
            _stash(_current())
            _uninstall()

    def save(self, ctx: Any, bits: Tensor) -> None:
        """Let a node save bits that were made aside."""
        ctx.save_for_backward(bits)
        if self.bits is not None:
            self.bits.append(StorageWeakRef(bits.untyped_storage()))

    def kept_aside(self) -> list[int]:
        """Bytes of the bits that nodes of this run keep now, if ``bits`` were asked for."""
        storages = [torch.UntypedStorage._new_with_weak_ptr(bits.cdata) for bits in self.bits or ()]
        return [storage.nbytes() for storage in storages if storage is not None]

    def holders(self) -> list[Holder]:
        """The live holders of nodes made in this run (see `Holder`)."""
        return [holder for holder in live_holders() if holder.run is self]


def lean_kernels() -> LeanKernels:
    """``with lean_kernels():`` autograd keeps only what the asked gradients read, in this thread of control."""
    return LeanKernels()


@contextmanager
def eager_kernels() -> Iterator[None]:
    """Torch's own kernels in this thread of control, whatever run is open in it."""
    run = _current()
    if run is not None:
        _stash(None)
    try:
        yield
    finally:
        if run is not None:
            _stash(run)


def watched_kernels() -> LeanKernels:
    """`lean_kernels` that can say all that they keep."""
    run = LeanKernels()
    run.bits = []
    return run


def _stash(run: LeanKernels | None) -> None:
    """Make it this thread of control's."""
    torch._C._stash_obj_in_tls(_TLS, run)
    if _is_not_held():
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(run))


@functools.cache
def _is_not_held() -> bool:
    """Whether torch lets go of what it stashes without ever having held it, as 2.11 does."""
    one = object()
    before = sys.getrefcount(one)
    torch._C._stash_obj_in_tls(f"{_TLS}: one", one)
    if sys.getrefcount(one) > before:
        return False
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))
    return True


def _current() -> LeanKernels | None:
    run = _stashed(_TLS) if _is_stashed(_TLS) else None
    while run is not None and not run.is_open:
        run = run._outer
    return run


def kernels_active() -> bool:
    return _current() is not None


def fallbacks() -> dict[str, Counter[str]]:
    """Which ops of this thread's run ran by torch's own kernel because their case is not covered, why, how often."""
    run = _current()
    return {} if run is None else run.fallbacks


def holders() -> Iterable[Holder]:
    """The live holders of nodes made in this thread's run."""
    run = _current()
    return [] if run is None else run.holders()


def _install() -> None:
    global _num_open, _library
    with _lock:
        _num_open += 1
        if _num_open == 1:
            gc.callbacks.append(collected)
        if _library is None:
            _library = torch.library.Library("aten", "IMPL")
            for name, rule in _rules.items():
                for key in _KEYS:
                    _library.impl(name, _kernel(name, rule, _KEYS[key]), key, with_keyset=True, allow_override=True)


def _uninstall() -> None:
    global _num_open, _library
    with _lock:
        _num_open -= 1
        if _num_open == 0:
            gc.callbacks.remove(collected)
        if _num_open == 0 and _library is not None and len(sys._current_frames()) == 1:
            _library._destroy()
            _library = None


def _kernel(name: str, rule: Rule, key: DispatchKey) -> Callable[..., Any]:
    overload = getattr(torch.ops.aten, name).default
    schema = overload._schema
    op = Op(overload._op, schema.is_mutable, name)
    redispatch = overload._handle.redispatch_boxed
    defaults = [argument.default_value for argument in schema.arguments]
    num_tensors = sum("Tensor" in str(argument.type) for argument in schema.arguments)  # which come first
    places = {argument.name: place for place, argument in enumerate(schema.arguments[:num_tensors])}
    num_told = rule.__code__.co_argcount if rule in _leave_out else -1
    ways: dict[int, tuple[DispatchKeySet, bool]] = {}

    def kernel(keyset: DispatchKeySet, *args: Any) -> Any:  # (those at the end may be left out)
        raw = keyset.raw_repr()
        if raw not in ways:
            ways[raw] = _own(keyset, key), _are_plain(keyset)
        own, plain = ways[raw]
        tensors = args[:num_tensors]
        run = _current() if _one_needs_gradient(tensors) and _is_grad_enabled() else None
        if run is not None:
            if waiting:
                look_again()
            try:
                if num_told >= 0:
                    unread = rule(*args[:num_told])
                    if unread:
                        _check_plain(tensors, plain)
                        users = users_hooks()
                        if users is not None and hooks_disabled():
                            raise NotCoveredError("saved-tensor hooks are disabled")
                        run.num_replaced += 1
                        if users is not None:
                            with LeaveOut([args[places[name]] for name in unread]):
                                return redispatch(own, *args)
                        result = redispatch(own, *args)
                        first = result if type(result) is not tuple else result[0]
                        if plain:
                            leave_out(first.grad_fn, unread)
                        else:
                            with aside(first):
                                leave_out(first.grad_fn, unread)
                        return result
                else:
                    _check_plain(tensors, plain)
                    result = rule(run, op, *args, *defaults[len(args) :])
                    if result is not NotImplemented:
                        run.num_replaced += 1
                        return result
            except NotCoveredError as why:
                run.fallbacks.setdefault(name, Counter())[str(why)] += 1
        return redispatch(own, *args)

    dynamo = torch._C._dynamo.eval_frame
    skip = dynamo._FrameAction.SKIP  # a compiler that comes upon it, between its graphs, is to leave it alone
    dynamo.set_code_exec_strategy(kernel.__code__, dynamo._FrameExecStrategy(skip, skip))
    return kernel


def _one_needs_gradient(tensors: Sequence[Tensor | None]) -> bool:
    for t in tensors:  # noqa: SIM110 (a step fewer; in a frame of its own, since tracers name values by variables)
        if t is not None and t.requires_grad:
            return True
    return False


def _own(keyset: DispatchKeySet, key: DispatchKey) -> DispatchKeySet:
    """Where torch's own autograd kernel is found.

    The Python dispatcher, which compilers turn on, would come back here by the key it finds itself.
    """
    return keyset.remove(key).remove(DispatchKey.PythonDispatcher) | _OWN


def _are_plain(keyset: DispatchKeySet) -> bool:
    """Whether it is that of dense tensors as they come, with no mode on."""
    return (keyset | _OF_DENSE).raw_repr() == _OF_DENSE.raw_repr()


def _check_plain(tensors: Sequence[Tensor | None], plain_keys: bool) -> None:
    """Raise `NotCoveredError` unless it is eager's autograd alone that is at work, on tensors as they come."""
    for t in tensors:
        if t is not None:
            kind = type(t)
            if not _is_plain(kind):
                raise NotCoveredError(f"{kind.__name__} runs ops of its own")
            if not t.is_floating_point() or (not plain_keys and (t.layout is not _STRIDED or t.is_neg())):
                raise NotCoveredError("not a strided floating-point tensor")
            if kind is FakeTensor and _compiling() is not None:
                raise NotCoveredError(_WATCHED)
    if transforming() or _tracing_state() is not None or _dispatch_mode(_PROXY) is not None:
        raise NotCoveredError(_WATCHED)


def check_no_hooks() -> None:
    """Raise `NotCoveredError` where the user has saved-tensor hooks set: bits are not what they expect to be given."""
    if users_hooks() is not None:
        raise NotCoveredError("saved-tensor hooks are to see what is kept")


_WATCHED = "inside torch.func, forward-mode AD, or a tracer"


@functools.lru_cache(maxsize=256)
def _is_plain(kind: type) -> bool:
    """Whether torch's kernels, and no code of the class, run for tensors of it."""
    return kind is FakeTensor or getattr(kind, "__torch_dispatch__", None) is torch._C._disabled_torch_dispatch_impl


# (Asked at every op, when nothing of it is in the processor's caches: so by few steps.)
_STRIDED, _PROXY = torch.strided, torch._C._TorchDispatchModeKey.PROXY
_is_grad_enabled = torch.is_grad_enabled
_tracing_state, _dispatch_mode = torch._C._get_tracing_state, torch._C._get_dispatch_mode
_compiling = torch._guards.TracingContext.try_get  # (compilers work on fake tensors)
_stashed, _is_stashed = torch._C._get_obj_in_tls, torch._C._is_key_in_tls


def replaced_ops() -> frozenset[str]:
    """The ops that rules are registered for, by schema name."""
    return frozenset(f"aten::{name}" for name in _rules)
