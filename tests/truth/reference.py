"""The truth: one step really run, on real tensors, and what it cost.

Nothing here shares a mechanism with frostline but the FLOP formulas, which have a truth of their own
(``tests/costing/``). Where the words of ``DESIGN.md`` leave room, this file decides:

* *Data* is every tensor not made from parameters, buffers and constants: the step's inputs, whatever the step's
  closure brings along, and random numbers drawn inside the forward. Buffers, plain tensor attributes of modules,
  ``torch.tensor(...)`` and factories, ``zeros_like`` and the like included, are neutral. What passes through a Python
  number (``.item()``) is lost. A write adds to what its storage holds and never takes away.
* An op of the backward is *grad_weight* if its result reaches, within its autograd node, only gradients towards
  tensors that a parameter and no data went into, whether or not those want a gradient; otherwise *grad_input*.
  An output that reaches nothing counts with the other outputs of its op; if those reach nothing either, grad_input.
* Inside a backward that runs autograd itself each inner node is judged by its own edges. What the outer backward
  computes besides is judged by every gradient it reaches, inner or outer, and by ``.grad`` of parameters.
* *recompute* is what runs while torch.utils.checkpoint re-runs its function in the backward, nothing else. All that
  runs before the loss returns is forward, gradients taken inside the step included.
* *saved* is what is still alive when only ``loss.grad_fn`` is held: model, inputs, outputs and attributes that the
  forward left on modules are let go first. Not counted, for no op takes it as a tensor: the RNG state that a checkpoint
  keeps (5056 bytes on CPU), and the number of ``x * 2.0``, which autograd keeps as a tensor of 8 bytes.
"""

from __future__ import annotations

import contextlib
import enum
import gc
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.utils.checkpoint
from tests.cases import Case
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import frostline as fl
from frostline.costing.formulas import flops

Method = Literal["freeze", "optimizer-only", "backward-inputs", "train-only"]
METHODS: tuple[Method, ...] = ("freeze", "optimizer-only", "backward-inputs", "train-only")


class Unreachable(Exception):  # noqa: N818  a finding, not a mistake
    """The loss requires no grad: nothing of the subset is reached."""


class Refused(Exception):  # noqa: N818  a finding, not a mistake
    """Torch refuses to run this step by this method (a reentrant checkpoint with ``backward(inputs=...)``)."""


@dataclass(frozen=True)
class Truth:
    """What one step cost.

    ``optimizer_bytes`` is None if the optimizer refuses the gradients (AdamW, sparse ones). ``uncounted`` names the
    ops that have no FLOP formula.
    """

    forward_flops: int
    grad_input_flops: int
    grad_weight_flops: int
    recompute_flops: int
    saved_bytes: int
    gradient_bytes: int
    optimizer_bytes: int | None
    parameter_bytes: int
    trained_with_grad: frozenset[str]
    uncounted: frozenset[str]


def measure(
    case: Case,
    train: Collection[str],
    method: Method = "freeze",
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
) -> Truth:
    """Run one step of a fresh copy of ``case`` twice: once to see what stays alive, once to see what runs.

    Raises:
        Unreachable: the loss requires no grad under the flags that ``method`` sets for ``train``.
        Refused: torch cannot run this step by this method.
    """
    saved_bytes = _saved_bytes(case, train, method)
    copy = case.fresh()
    model = copy.model
    trained = _set_flags(model, train, method)
    recorder = _Recorder(model)
    with _run(model, train, method), recorder:
        loss = copy.run()
        recorder.phase = "backward"
        _run_backward(loss, trained, method)
    gradient_bytes = sum(_nbytes(p.grad) for p in model.parameters() if p.grad is not None)
    return Truth(
        forward_flops=recorder.forward_flops,
        grad_input_flops=recorder.grad_input_flops,
        grad_weight_flops=recorder.grad_weight_flops,
        recompute_flops=recorder.recompute_flops,
        saved_bytes=saved_bytes,
        gradient_bytes=gradient_bytes,
        optimizer_bytes=_optimizer_bytes(trained, optimizer),
        parameter_bytes=sum({_key(s): s.nbytes() for p in model.parameters() if (s := _storage(p))}.values()),
        trained_with_grad=frozenset(name for name in train if model.get_parameter(name).grad is not None),
        uncounted=frozenset(recorder.uncounted),
    )


def _set_flags(model: nn.Module, train: Collection[str], method: Method) -> list[nn.Parameter]:
    """Set ``requires_grad`` as the method does; return the subset, a tied parameter once."""
    trained = list({id(p): p for p in map(model.get_parameter, train)}.values())
    chosen = {id(p) for p in trained}
    for parameter in model.parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(method not in ("freeze", "train-only") or id(parameter) in chosen)
    return trained


def _run(model: nn.Module, train: Collection[str], method: Method) -> contextlib.AbstractContextManager[Any]:
    return fl.train_only(model, list(train)) if method == "train-only" else contextlib.nullcontext()


def _run_backward(loss: Tensor, trained: list[nn.Parameter], method: Method) -> None:
    try:
        loss.backward(inputs=trained if method == "backward-inputs" else None)
    except RuntimeError as error:
        if "use_reentrant=True" in str(error):
            raise Refused(str(error)) from error
        raise


def _optimizer_bytes(trained: list[nn.Parameter], optimizer: Callable[..., torch.optim.Optimizer]) -> int | None:
    if not trained:
        return 0
    instance = optimizer(trained)
    try:
        instance.step()
    except RuntimeError as error:
        if "sparse" in str(error):
            return None
        raise
    return sum(_nbytes(t) for state in instance.state.values() for t in tree_leaves(state) if isinstance(t, Tensor))


def _nbytes(tensor: Tensor) -> int:
    if tensor.layout == torch.sparse_coo:
        return _nbytes(tensor._indices()) + _nbytes(tensor._values())
    return tensor.numel() * tensor.element_size()


# What stays alive ----------------------------------------------------------------------------------------------------


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    """A tensor's storage; None for a sparse tensor, which has none."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def _key(storage: torch.UntypedStorage) -> int:
    return storage._cdata


def _address(storage: torch.UntypedStorage) -> int:
    return torch._C._data_address(torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage))


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class _Storages:
    """Storages seen so far, held weakly. While a weak reference is held no new storage can take the old address."""

    def __init__(self) -> None:
        self.references: dict[int, StorageWeakRef] = {}

    def see(self, tensor: Tensor) -> int | None:
        storage = _storage(tensor)
        if storage is None:
            return None
        key = _key(storage)
        if key not in self.references:
            self.references[key] = StorageWeakRef(storage)
        return key

    def alive(self) -> Iterator[tuple[int, torch.UntypedStorage]]:
        """Key and storage of all that something still holds."""
        for key, reference in self.references.items():
            storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
            if storage is not None:
                yield key, storage


class _SeeEverything(TorchDispatchMode):
    """Notes the storage of every argument and result of every op."""

    def __init__(self, storages: _Storages) -> None:
        super().__init__()
        self.storages = storages

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        for tensor in _tensors((args, kwargs, out)):
            if not tensor._is_zerotensor():  # forward mode's tangents of zeros: a storage that is never allocated
                self.storages.see(tensor)
        return out


def _saved_bytes(case: Case, train: Collection[str], method: Method) -> int:
    """Run the forward, let go of all but ``loss.grad_fn``, and add up the storages that did not die."""
    gc.freeze()  # what is alive already stays alive: the collection below need not look through it
    try:
        copy = case.fresh()
        _set_flags(copy.model, train, method)
        before = {module: dict(vars(module)) for module in copy.model.modules()}
        seen, excluded = _Storages(), _Storages()
        for tensor in _tensors(copy.inputs):
            seen.see(tensor)
        _see_registered(excluded, copy.model)
        with _run(copy.model, train, method), _SeeEverything(seen):
            loss = copy.run()
        _see_registered(excluded, copy.model)
        addresses = {
            torch._C._data_address(buffer) for buffer in copy.model.buffers() if buffer.layout is torch.strided
        }
        root = loss.grad_fn
        for module, attributes in before.items():
            vars(module).clear()
            vars(module).update(attributes)
        del before, copy, loss
        with contextlib.suppress(NameError):
            del module, attributes, tensor
        gc.collect()
        _see_kept_by_kernels(seen, root)
        saved = sum(
            storage.nbytes()
            for key, storage in seen.alive()
            if key not in excluded.references and _address(storage) not in addresses  # (a copy on write shares memory)
        )
        if root is None:
            raise Unreachable(f"the loss requires no grad with {sorted(train)} by {method}")
        return saved
    finally:
        gc.unfreeze()


def _see_kept_by_kernels(storages: _Storages, root: Any) -> None:
    """See what the nodes of frostline's own kernels refer to: no op of the step is given it."""
    nodes, waiting = {}, [root]
    while waiting:
        node = waiting.pop()
        if node is not None and id(node) not in nodes:
            nodes[id(node)] = node
            waiting += [behind for behind, _ in node.next_functions]
    for node in nodes.values():
        forward = getattr(node, "_forward_cls", None)
        if forward is not None and forward.__module__.startswith("frostline."):
            saved = [kept.data for kept in node._raw_saved_tensors]  # (unpacking would run a checkpoint again)
            for tensor in _attributes([*saved, vars(node)]):
                storages.see(tensor)


def _attributes(value: Any) -> Iterator[Tensor]:
    """The tensors in an object's attributes, and in those of its attributes."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for each in gc.get_referents(value):
            yield from _attributes(each)
    elif hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value):
        yield from _attributes(vars(value))


def _see_registered(storages: _Storages, model: nn.Module) -> None:
    for tensor in [*model.parameters(), *model.buffers()]:
        storages.see(tensor)


# What runs -----------------------------------------------------------------------------------------------------------


class _Origin(enum.IntFlag):
    """What went into a tensor; 0 is neutral."""

    NEUTRAL = 0
    PARAMETER = 1
    DATA = 2


class _Side(enum.IntFlag):
    """Which gradients a result reached; 0 is none."""

    NONE = 0
    WEIGHT = 1
    INPUT = 2


def _side(origin: _Origin) -> _Side:
    return _Side.WEIGHT if origin == _Origin.PARAMETER else _Side.INPUT


# Values of these do not depend on values of their arguments.
_FACTORIES = frozenset(
    f"aten::{name}"
    for name in (
        "empty_like",
        "zeros_like",
        "ones_like",
        "full_like",
        "new_empty",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_empty_strided",
        "lift_fresh",  # what torch.tensor(...) ends in
        "lift_fresh_copy",
        "lift",
    )
)


@dataclass(eq=False)
class _Event:
    """One output of one op of the backward that cost something."""

    flops: int
    side: _Side = _Side.NONE
    open: bool = True


@dataclass
class _Frame:
    """One autograd node while it runs."""

    is_function: bool
    calls: list[list[_Event]] = field(default_factory=list)  # events of one op call together


# Under these keys a node's own metadata, which live and die with it, hold what the forward knew about its edges.
_OUTPUTS, _ARGUMENTS, _HOOKED = "truth: outputs", "truth: arguments", "truth: hooked"


class _Recorder(TorchDispatchMode):
    """Counts the FLOPs of a step, phase by phase, and tells grad_input from grad_weight."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.phase: Literal["forward", "backward"] = "forward"
        self.forward_flops = self.grad_input_flops = self.grad_weight_flops = self.recompute_flops = 0
        self.uncounted: set[str] = set()
        self.guessed_edges = 0  # edges whose tensor no op ever took; judged by what lies behind them
        self._storages = _Storages()
        self._origins: dict[int, _Origin] = {}
        self._events: dict[int, set[_Event]] = {}  # by storage: whose results it holds
        self._frames: list[_Frame] = []
        self._recomputing = 0
        self._parameters = list(model.parameters())
        self._patches = contextlib.ExitStack()
        for module in model.modules():
            for tensor in _tensors([v for k, v in vars(module).items() if k not in ("_modules", "_parameters")]):
                self._set_origin(tensor, _Origin.NEUTRAL)
        for parameter in self._parameters:
            self._set_origin(parameter, _Origin.PARAMETER)

    def __enter__(self) -> _Recorder:
        self._patches.enter_context(_patched_checkpoints(self._mark_recompute))
        self._patches.enter_context(_patched_function_apply(self._note_function))
        self._patches.enter_context(_patched_engine(self._before_engine))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._patches.close()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arguments = _tensors((args, kwargs))
        origin, carried = _Origin.NEUTRAL, set[_Event]()
        factory = op._schema.name in _FACTORIES
        for tensor in arguments:
            own = _Origin.NEUTRAL if factory else self._origin(tensor)
            self._note_edge(tensor, own)
            origin |= own
            if self._frames and not factory:
                carried |= self._events_in(tensor)
        if torch.Tag.nondeterministic_seeded in op.tags:
            origin |= _Origin.DATA
        written = _written(op, args, kwargs)
        out = op(*args, **kwargs)
        outputs = _flat_outputs(out)
        events = self._count(op, args, kwargs, outputs)
        for tensor in written:
            self._add(tensor, origin, carried)
        for tensor, event in zip(outputs, events, strict=True):
            if tensor is not None:
                self._add(tensor, origin, carried | {event} if event else carried)
        return out

    def _count(self, op: Any, args: Any, kwargs: Any, outputs: tuple[Tensor | None, ...]) -> list[_Event | None]:
        """Book what a call cost; give back the event of each output that is to be followed."""
        events: list[_Event | None] = [None] * len(outputs)
        count = flops(op, args, kwargs, outputs)
        if count is None:
            self.uncounted.add(str(op))
        elif self.phase == "forward":
            self.forward_flops += sum(count)
        elif self._recomputing:
            self.recompute_flops += sum(count)
        elif not self._frames:  # a tensor hook of the user's
            self.grad_input_flops += sum(count)
        elif any(count):
            # A free output is followed too: it may say where a sibling that reaches nothing belongs.
            events = [_Event(each) for each in count]
            self._frames[-1].calls.append([event for event in events if event])
        return events

    # Origins and events, by storage.

    def _set_origin(self, tensor: Tensor, origin: _Origin) -> None:
        key = self._storages.see(tensor)
        if key is not None:
            self._origins[key] = origin

    def _origin(self, tensor: Tensor) -> _Origin:
        if tensor.layout == torch.sparse_coo:
            return self._origin(tensor._indices()) | self._origin(tensor._values())
        key = self._storages.see(tensor)
        return _Origin.DATA if key is None else self._origins.setdefault(key, _Origin.DATA)

    def _events_in(self, tensor: Tensor) -> set[_Event]:
        """Events of nodes still running whose results this tensor holds."""
        storage = _storage(tensor)
        held = self._events.get(_key(storage), ()) if storage is not None else ()
        return {event for event in held if event.open}

    def _add(self, tensor: Tensor, origin: _Origin, events: set[_Event]) -> None:
        parts = [tensor._indices(), tensor._values()] if tensor.layout == torch.sparse_coo else [tensor]
        for part in parts:
            key = self._storages.see(part)
            if key is not None:
                self._origins[key] = self._origins.get(key, _Origin.NEUTRAL) | origin
                if events:
                    self._events[key] = {e for e in self._events.get(key, ()) if e.open} | events

    # Edges of the autograd graph.

    def _note_edge(self, tensor: Tensor, origin: _Origin) -> None:
        """Remember at the node that made ``tensor`` what went into it; the base of a view too, for writes use that."""
        for each in (tensor, tensor._base) if tensor._is_view() else (tensor,):
            node = None
            with contextlib.suppress(RuntimeError):  # (a view that autograd refuses to use: made under no_grad)
                node = each.grad_fn if each is not None else None
            if node is not None:
                known = node.metadata.setdefault(_OUTPUTS, {})
                known[each.output_nr] = known.get(each.output_nr, _Origin.NEUTRAL) | origin

    def _note_function(self, function: type, apply: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Remember at a Function's node what went into each of its tensor arguments, frozen ones too."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        origins = [self._origin(tensor) for tensor in tensors]
        for tensor, origin in zip(tensors, origins, strict=True):
            self._note_edge(tensor, origin)
        out = apply(*args)
        for tensor in _tensors(out):
            if isinstance(tensor.grad_fn, function._backward_cls):
                tensor.grad_fn.metadata.setdefault(_ARGUMENTS, origins)
        return out

    def _edge_origin(self, node: Any, output_nr: int) -> _Origin:
        if hasattr(node, "variable"):  # a leaf
            return self._origin(node.variable)
        known = node.metadata.get(_OUTPUTS, {})
        if output_nr not in known:
            self.guessed_edges += 1
            origin = _Origin.NEUTRAL
            for behind, nr in node.next_functions:
                origin |= self._edge_origin(behind, nr) if behind is not None else _Origin.NEUTRAL
            known[output_nr] = origin
            node.metadata[_OUTPUTS] = known
        return known[output_nr]

    # The backward.

    def _before_engine(self, roots: tuple[Any, ...]) -> None:
        """Follow every node that this run of the autograd engine may reach."""
        if self.phase != "backward":
            return
        stack = [root.grad_fn if isinstance(root, Tensor) else root.node for root in roots]
        while stack:
            node = stack.pop()
            if node is None or hasattr(node, "variable") or _HOOKED in node.metadata:
                continue
            node.metadata[_HOOKED] = True
            self._follow(node)
            stack.extend(behind for behind, _ in node.next_functions)

    def _follow(self, node: Any) -> None:
        arguments = node.metadata.get(_ARGUMENTS)
        slots: list[_Side] = []
        for i, (behind, nr) in enumerate(node.next_functions):
            if behind is not None:
                slots.append(_side(self._edge_origin(behind, nr)))
            else:
                slots.append(_side(arguments[i]) if arguments else _Side.NONE)
        is_function = isinstance(node, torch.autograd.function.BackwardCFunction)

        def enter(grad_outputs: Any) -> None:
            self._frames.append(_Frame(is_function))

        def leave(grad_inputs: Any, grad_outputs: Any) -> None:
            self._reached(grad_inputs, slots)
            self._close(self._frames.pop())

        node.register_prehook(enter)
        node.register_hook(leave)

    def _reached(self, grad_inputs: tuple[Tensor | None, ...], slots: list[_Side]) -> None:
        for grad, side in zip(grad_inputs, slots, strict=True):
            if grad is not None:
                for part in [grad._indices(), grad._values()] if grad.layout == torch.sparse_coo else [grad]:
                    for event in self._events_in(part):
                        event.side |= side

    def _close(self, frame: _Frame) -> None:
        if frame.is_function:  # it may have written .grad itself
            for parameter in self._parameters:
                if parameter.grad is not None and parameter.grad.layout != torch.sparse_coo:
                    for event in self._events_in(parameter.grad):
                        event.side |= event.side or _Side.WEIGHT
        for call in frame.calls:
            together = _Side.NONE
            for event in call:
                together |= event.side
            for event in call:
                event.open = False
                if (event.side or together) == _Side.WEIGHT:
                    self.grad_weight_flops += event.flops
                else:
                    self.grad_input_flops += event.flops

    def _mark_recompute(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, and while the backward runs it everything in it is recompute."""

        def marked(*args: Any, **kwargs: Any) -> Any:
            if self.phase != "backward":
                return function(*args, **kwargs)
            self._recomputing += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._recomputing -= 1

        return marked


def _flat_outputs(out: Any) -> tuple[Tensor | None, ...]:
    """An op's outputs, tensor lists laid out flat, an undefined one as None."""
    if isinstance(out, (tuple, list)):
        return tuple(each for item in out for each in _flat_outputs(item))
    return (out,) if isinstance(out, Tensor) else (None,)


def _written(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an op writes, by its schema."""
    found: list[Tensor] = []
    for i, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += _tensors(args[i] if i < len(args) else kwargs.get(argument.name))
    return found


@contextlib.contextmanager
def _patched_checkpoints(mark: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Mark the function of every checkpoint made inside, of both kinds, however the caller imported it."""
    module = torch.utils.checkpoint
    frame_init, forward = module._CheckpointFrame.__init__, module.CheckpointFunction.forward

    def marked_init(self: Any, recompute_fn: Callable[..., Any], *args: Any) -> None:
        frame_init(self, mark(recompute_fn), *args)

    def marked_forward(ctx: Any, run_function: Callable[..., Any], *args: Any) -> Any:
        return forward(ctx, mark(run_function), *args)

    module._CheckpointFrame.__init__ = marked_init
    module.CheckpointFunction.forward = staticmethod(marked_forward)
    try:
        yield
    finally:
        module._CheckpointFrame.__init__ = frame_init
        module.CheckpointFunction.forward = staticmethod(forward)


@contextlib.contextmanager
def _patched_function_apply(note: Callable[[type, Callable[..., Any], tuple[Any, ...]], Any]) -> Iterator[None]:
    """See every ``autograd.Function`` call. ``Function.apply`` ends in this class's, so stored references do too."""
    single, base = torch.autograd.function._SingleLevelFunction, torch._C._FunctionBase
    assert "apply" not in vars(single) or vars(single)["apply"] is vars(base)["apply"]
    patched = single if isinstance(vars(torch.autograd.Function)["apply"], classmethod) else torch.autograd.Function
    before = vars(patched).get("apply")

    def apply(cls: type, *args: Any) -> Any:
        return note(cls, vars(base)["apply"].__get__(None, cls), args)

    patched.apply = classmethod(apply)
    try:
        yield
    finally:
        if before is None:
            del patched.apply
        else:
            patched.apply = before


@contextlib.contextmanager
def _patched_engine(before: Callable[[tuple[Any, ...]], None]) -> Iterator[None]:
    """Call ``before`` with the roots of every run of the autograd engine, nested ones too."""
    engine = torch.autograd._engine_run_backward

    def run(t_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        before(tuple(t_outputs))
        return engine(t_outputs, *args, **kwargs)

    torch.autograd._engine_run_backward = run
    try:
        yield
    finally:
        torch.autograd._engine_run_backward = engine
