"""One step under observation: what each op of its backward was for, and what autograd kept for it."""

from __future__ import annotations

import bisect
import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from frostline.costing.formulas import flops
from frostline.kernels import settle
from frostline.probing.attribution import storage_key
from frostline.running.kept import Seen, graph, kept_storages
from frostline.tracing.calls import UNSEEN, flat_outputs, makes_constant, tensors_in, written
from frostline.tracing.interception import is_reentrant_checkpoint, observed_by


class Use(IntEnum):
    """What a gradient was computed for; a result that serves several takes the greatest."""

    NOTHING = 0  # no gradient of its node had anything of it
    DISCARDED = 1  # a gradient that autograd throws away: its tensor requires none
    FORCED = 2  # a tensor that requires grad, and is no parameter
    FOREIGN = 3  # a parameter that is not to train
    ASKED = 4  # a parameter that is to train


@dataclass(eq=False, slots=True)
class RanOp:
    """One op call of the backward: per output its FLOPs and its use; ``mask`` says which outputs there were.

    What a checkpoint recomputes is of use to whatever the node that asked for it is.
    """

    name: str
    node: str
    module: str
    mask: tuple[bool, ...]
    flops: tuple[int, ...]
    uses: list[Use]
    recomputed: bool
    in_node: bool  # whether autograd ran it for one of its nodes; else a hook of the user's did


@dataclass(eq=False, slots=True)
class _Frame:
    """One autograd node while it runs."""

    module: str
    use: Use  # of all that it does
    uses: list[Use]  # of each of its slots
    ops: list[RanOp] = field(default_factory=list)


@dataclass(frozen=True)
class Leaf:
    """A tensor that autograd would put a gradient on and that is not to train: a parameter by name, or another."""

    name: str
    module: str
    shape: tuple[int, ...]


_Mark = tuple[RanOp, int]  # an op and which of its outputs
_TRAINS = "frostline: trains"  # at a reentrant checkpoint's node: whether its backward puts gradients on what trains


class StepRecorder(TorchDispatchMode):
    """Sees the ops of a step, and the runs of autograd's engine in it, in its own thread and those working for it.

    Attributes:
        ops: every op call of the backward.
        reached: names of the trained parameters that got a gradient.
        leaves: tensors that got, or would have got, a gradient though they are not to train.
        kept: the storages that autograd kept when the loss returned (at the largest of several backward runs).
        uncounted: ops of the backward without a FLOP formula.
    """

    def __init__(self, model: nn.Module, trained: Mapping[str, nn.Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model = model
        self.trained = dict(trained)
        self.ops: list[RanOp] = []
        self.reached: set[str] = set()
        self.leaves: dict[Leaf, None] = {}
        self.kept: dict[int, int] = {}
        self.uncounted: set[str] = set()
        self.num_backward_runs = 0
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._trained_ids = {id(parameter) for parameter in trained.values()}
        self._trained_keys = {_key(parameter) for parameter in trained.values()}
        self._module_names = {id(module): name for name, module in model.named_modules()}
        self._seen = Seen()
        self._stack: list[str] = []
        self._node_numbers: list[int] = []  # from this sequence number on, nodes are made in ...
        self._node_modules: list[str] = []  # ... this module
        self._came_from: dict[int, str] = {}  # storages of tensors without a graph: the innermost module they left
        self._frames: dict[Any, _Frame] = {}  # nodes that run, by sequence number
        self._marks: dict[int, tuple[StorageWeakRef, set[_Mark]]] = {}
        self._depth = 0  # of runs of autograd's engine within each other
        self._recomputing = 0
        self._touches: list[bool] = []  # for each reentrant checkpoint that runs: whether it uses what trains

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch this thread's ops, modules and backward runs."""
        engine = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

        def run(t_outputs: Any, *args: Any, **kwargs: Any) -> Any:
            if self not in _get_current_dispatch_mode_stack():  # another thread's
                return engine(t_outputs, *args, **kwargs)
            self._before_backward(tuple(t_outputs))
            self._depth += 1
            try:
                return engine(t_outputs, *args, **kwargs)
            finally:
                self._depth -= 1

        def note(name: str) -> Callable[[Any], None]:
            return lambda gradient: None if gradient is None else self.reached.add(name)

        with ExitStack() as stack:
            for name, parameter in self.trained.items():
                if parameter.requires_grad:
                    stack.callback(parameter.register_hook(note(name)).remove)
            stack.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", run))
            stack.enter_context(observed_by(self))
            stack.enter_context(self)
            yield

    # -- forward: where nodes and tensors come from --------------------------------------------------------------------

    def on_module(self, module: nn.Module, run: Callable[[], Any]) -> Any:
        name = self._module_names.get(id(module))
        if name is None:  # a loss, say; or a replica
            name = self._stack[-1] if self._stack else type(module).__name__
        self._stack.append(name)
        self._note_module()
        try:
            result = run()
        finally:
            self._stack.pop()
            self._note_module()
        for tensor in tensors_in(result):
            if tensor.grad_fn is None:  # something may make it require grad yet
                self._came_from.setdefault(_key(tensor), name)
        return result

    def _note_module(self) -> None:
        self._node_numbers.append(_next_number())
        self._node_modules.append(self._stack[-1] if self._stack else "")

    def _module_of(self, number: int) -> str:
        at = bisect.bisect_right(self._node_numbers, number) - 1
        return self._node_modules[at] if at >= 0 else ""

    def on_apply(self, cls: type, args: tuple[Any, ...], run: Callable[..., Any]) -> Any:
        if not is_reentrant_checkpoint(cls) or not args:
            return run(*args)
        self._touches.append(False)
        try:
            result = run(self.run_again(args[0]), *args[1:])
        finally:
            touched = self._touches.pop()
            self._touched(touched)
        for tensor in tensors_in(result):
            node: Any = tensor.grad_fn
            if node is not None:
                node.metadata[_TRAINS] = touched
        return result

    def _touched(self, touched: bool) -> None:
        if touched and self._touches:
            self._touches[-1] = True

    def checkpoint_region(self, *_: Any) -> Any:
        return nullcontext()

    def run_again(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``; what it does while the backward runs it is recompute."""

        def marked(*args: Any, **kwargs: Any) -> Any:
            if not self._depth:
                return function(*args, **kwargs)
            self._recomputing += 1
            try:
                return function(*args, **kwargs)
            finally:
                self._recomputing -= 1

        return marked

    # -- ops -----------------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._seen.given((args, kwargs))
        if self._touches:
            self._touched(any(_key(tensor) in self._trained_keys for tensor in tensors_in((args, kwargs))))
        result = op(*args, **kwargs)
        self._seen.returned(result)
        if self._depth and op.namespace not in UNSEEN:
            self._record(op, args, kwargs, result)
        return result

    def _record(self, op: Any, args: Any, kwargs: Any, result: Any) -> None:
        node = torch._C._current_autograd_node()
        frame = None if node is None else self._frames.get(node._sequence_nr())
        outputs = flat_outputs(result)
        counted = flops(op, args, kwargs, outputs)
        if counted is None:
            self.uncounted.add(str(op))
        module = self._stack[-1] if self._stack else "" if frame is None else frame.module
        ran = RanOp(
            name=op.name().removeprefix("aten::") if hasattr(op, "name") else str(op),
            node="" if node is None else node.name(),
            module=module,
            mask=tuple(output is not None for output in outputs),
            flops=counted or (0,) * len(outputs),
            uses=[frame.use if frame is not None and self._recomputing else Use.NOTHING] * len(outputs),
            recomputed=self._recomputing > 0,
            in_node=frame is not None,
        )
        self.ops.append(ran)
        if frame is None or ran.recomputed:
            return
        frame.ops.append(ran)
        through: set[_Mark] = set()
        if not makes_constant(op):
            for tensor in tensors_in((args, kwargs)):
                through |= self._marks_of(tensor)
        for position, output in enumerate(outputs):
            if output is not None:
                self._mark(output, through | {(ran, position)})
        for tensor in written(op, args, kwargs):
            self._mark(tensor, through | {(ran, 0)})

    def _marks_of(self, tensor: Tensor) -> set[_Mark]:
        """The ops of nodes still running whose results this tensor has something of."""
        return {mark for part in _parts(tensor) for mark in self._marks.get(_key(part), (None, set()))[1]}

    def _mark(self, tensor: Tensor, marks: set[_Mark]) -> None:
        for part in _parts(tensor):
            with suppress(NotImplementedError, RuntimeError):  # layouts without a storage of their own
                storage = part.untyped_storage()
                known = self._marks.setdefault(storage._cdata, (StorageWeakRef(storage), set()))
                known[1].update(marks)

    # -- backward: what gradients are for ------------------------------------------------------------------------------

    def _before_backward(self, roots: tuple[Any, ...]) -> None:
        """Hook every node that this run of the engine may reach, and look at what the graph keeps."""
        nodes = graph([root.grad_fn if isinstance(root, Tensor) else root.node for root in roots])
        if not self._depth:
            self.num_backward_runs += 1
            gc.collect()
            settle()
            kept = kept_storages(self._seen, nodes, roots, self.model)
            if sum(kept.values()) > sum(self.kept.values()):
                self.kept = kept
        inside = torch._C._current_autograd_node() if self._depth else None
        outer = None if inside is None else self._frames.get(inside._sequence_nr())
        uses: dict[Any, Use] = {}
        for node in nodes:  # what is behind a node comes before it
            if hasattr(node, "variable"):
                uses[node] = self._use_of_leaf(node.variable, outer)
                continue
            behind = [uses[each] for each, _ in node.next_functions if each is not None]
            uses[node] = Use.ASKED if node.metadata.get(_TRAINS) else max(behind, default=Use.FORCED)
        for node in nodes:
            if not hasattr(node, "variable") and self not in node.metadata:
                node.metadata[self] = True
                slots = [Use.DISCARDED if each is None else uses[each] for each, _ in node.next_functions]
                self._follow(node, uses[node], slots)

    def _use_of_leaf(self, variable: Tensor, outer: _Frame | None) -> Use:
        if id(variable) in self._trained_ids:
            return Use.ASKED
        name = self._names.get(id(variable), "")
        if name:
            self.leaves[Leaf(name, name.rpartition(".")[0], tuple(variable.shape))] = None
            return Use.FOREIGN
        if outer is not None:  # what a checkpoint detached: its gradient goes on outside
            return max(outer.uses, default=Use.FORCED)
        self.leaves[Leaf("", self._came_from.get(_key(variable), ""), tuple(variable.shape))] = None
        return Use.FORCED

    def _follow(self, node: Any, use: Use, uses: list[Use]) -> None:
        number = node._sequence_nr()
        module = self._module_of(number)

        def enter(_: Any) -> None:
            self._frames[number] = _Frame(module, use, uses)

        def leave(gradients: Any, _: Any) -> None:
            frame = self._frames.pop(number, None)
            if frame is not None:
                self._finish(frame, gradients)

        node.register_prehook(enter)
        node.register_hook(leave)

    def _finish(self, frame: _Frame, gradients: tuple[Tensor | None, ...]) -> None:
        for gradient, use in zip(gradients, frame.uses, strict=False):
            self._landed(gradient, use)
        if any(use is Use.NOTHING for op in frame.ops for use in op.uses):  # a Function may write .grad by itself
            for parameter in self.trained.values():
                self._landed(parameter.grad, Use.ASKED)
        done = set(frame.ops)
        for key, (_, marks) in list(self._marks.items()):
            left = {mark for mark in marks if mark[0] not in done}
            if left:
                marks.intersection_update(left)
            else:
                del self._marks[key]

    def _landed(self, gradient: Tensor | None, use: Use) -> None:
        if gradient is not None:
            for op, position in self._marks_of(gradient):
                op.uses[position] = max(op.uses[position], use)


def _next_number() -> int:
    """The sequence number that autograd would give the next node of this thread."""
    return int(torch._C._autograd._get_sequence_nr())


def _parts(tensor: Tensor) -> list[Tensor]:
    return [tensor._indices(), tensor._values()] if tensor.layout is torch.sparse_coo else [tensor]


def _key(tensor: Tensor) -> int:
    key = storage_key(tensor)
    return -1 if key is None else key
