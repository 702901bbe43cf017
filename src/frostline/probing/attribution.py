"""Recording a replay's ops, and finding out which gradient each backward op was for.

An op of the backward belongs to the autograd node that runs it; the slots of that node its result lands in say what
it is a gradient towards. Results are followed through their storages, so that views and in-place sums count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from frostline.probing.crashes import refuse_crash
from frostline.tracing.calls import (
    UNSEEN,
    Side,
    TensorMeta,
    aliases,
    describe,
    flat_outputs,
    grad_fn_of,
    makes_constant,
    result_side,
    tensors_in,
    written,
)

Mark = tuple[int, int]  # (number of a recorded op, which of its outputs)


@dataclass(frozen=True, slots=True)
class RanOp:
    """One op call that a replay ran. Tensors in ``args`` are `TensorMeta`.

    ``sides``: per output, whether it is a gradient towards weights alone or (also) towards data; None where it reached
    no gradient of its node.
    ``recomputed``: forward work done again by a checkpoint.
    ``node``: the sequence number of the autograd node that ran it.
    ``alive``: bytes of the storages that backward had made, and that lived, when it returned.
    ``saved``: which of its tensors, numbered as they come among its arguments, were there before backward began.
    """

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[TensorMeta | None, ...]
    sides: tuple[Side | None, ...] = ()
    recomputed: bool = False
    node: int | None = field(default=None, compare=False)
    alive: int = field(default=0, compare=False)
    saved: frozenset[int] = frozenset()


@dataclass(slots=True)
class _Running:
    op: Any
    args: Any
    kwargs: Any
    outputs: tuple[TensorMeta | None, ...]
    recomputed: bool
    node: int | None  # sequence number of the autograd node that runs it
    done: bool  # whether that node is
    sides: list[Side | None]
    alive: int = 0
    saved: frozenset[int] = frozenset()


class UndefinedGradientError(RuntimeError):
    """A fake kernel would have to say what comes of a gradient that nobody computed."""


def _undefined(op: Any, args: Any) -> bool:
    """Whether an op is given nothing where it takes a tensor, or no gradient at all where it takes some."""
    expected = list(zip(args, op._schema.arguments, strict=False))
    gradients = [value for value, argument in expected if argument.name.startswith("grad")]
    if gradients and all(value is None for value in gradients):
        return True
    return any(value is None and isinstance(argument.type, torch.TensorType) for value, argument in expected)


def storage_key(tensor: Tensor) -> int | None:
    """Identifies a live storage; None for tensors that have none of their own (sparse ones)."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return None


class Recording(TorchDispatchMode):
    """Records one replay: ops, storages (weakly), the side of every tensor, and sides of gradients."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.storages: dict[int, StorageWeakRef] = {}
        self.nbytes: dict[int, int] = {}
        self.dtypes: dict[int, torch.dtype] = {}
        self.alive: dict[int, int] = {}  # bytes of the storages made since `count_anew` that live, by key
        self.incoming: set[int] = set()  # storages of the gradients that backward starts from
        self.alive_log: list[int] | None = None  # receives `alive_bytes` after every op
        self.secondary: set[int] = set()  # storages that were a second or later result of a kernel
        self.ops: list[_Running] = []
        self.runner: Callable[[Any, Any, Any], Any] | None = None  # runs the ops that are recorded, if set
        self.listening = False
        self.recomputing = False
        self._storage_sides: dict[int, Side] = {}
        self._stands_for: dict[int, int] = {}  # a fake mode's storage for that of a real tensor
        self._edge_sides: dict[tuple[int, int], Side] = {}
        self._function_sides: dict[int, list[Side]] = {}
        self._marks: dict[int, frozenset[Mark]] = {}
        self._hooked: set[int] = set()
        self._entered: set[int] = set()  # nodes that run, or have: a tensor's hooks run before its node does

    # -- forward: storages and sides -----------------------------------------------------------------------------------

    def follow(self, tensors: Sequence[Tensor], sides: Sequence[Side] | None = None) -> None:
        """Watch whether the storages of ``tensors`` stay alive; ``sides`` says what they were made from."""
        for position, tensor in enumerate(tensors):
            key = storage_key(tensor)
            if key is None:
                continue
            if key not in self.storages:
                self.storages[key] = StorageWeakRef(tensor.untyped_storage())
                self.nbytes[key] = self.alive[key] = tensor.untyped_storage().nbytes()
                self.dtypes[key] = tensor.dtype
            if sides is not None:
                key = self._stands_for.get(key, key)
                self._storage_sides[key] = max(self._storage_sides.get(key, Side.CONSTANT), sides[position])

    def count_anew(self) -> None:
        """Count only storages made from here on."""
        self.alive.clear()

    def alive_bytes(self) -> int:
        """Bytes of the counted storages that live."""
        for key in [key for key in self.alive if self.storages[key].expired()]:
            del self.alive[key]
        return sum(self.alive.values())

    def side_of(self, tensor: Tensor) -> Side:
        key = storage_key(tensor)
        return Side.DATA if key is None else self._storage_sides.get(self._stands_for.get(key, key), Side.DATA)

    def on_module(self, module: Any, run: Any) -> Any:
        return run()

    def on_apply(self, cls: type, args: tuple[Any, ...], run: Any) -> Any:
        """A Function that runs in the replay: what its slots stand for is said by its arguments."""
        result = run(*args)
        self.note_function(args, result)
        return result

    def checkpoint_region(self, *_: Any) -> Any:
        return nullcontext()

    def run_again(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    def note_function(self, arguments: Sequence[Any], result: Any) -> None:
        """Say which tensors went into a Function's node: its slots are theirs, wanted or not."""
        sides = [self.side_of(a) for a in arguments if isinstance(a, Tensor)]
        for tensor in tensors_in(result):
            node = grad_fn_of(tensor)
            if node is not None:
                self._function_sides[node._sequence_nr()] = sides
                return

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.listening and _undefined(op, args) and any(isinstance(t, FakeTensor) for t in tensors_in(args)):
            raise UndefinedGradientError(
                f"a gradient that {op} is given is undefined, and fake kernels do not say what comes of it"
            )
        refuse_crash(op, args)
        watched = self.listening and self.runner is not None and op.namespace not in UNSEEN
        result = self.runner(op, args, kwargs) if watched and self.runner is not None else op(*args, **kwargs)
        if op.namespace in UNSEEN:
            return result
        for position, part in aliases(op, result):
            own = storage_key(args[position]) if position < len(args) and isinstance(args[position], Tensor) else None
            for key in map(storage_key, tensors_in(part)):
                if own is not None and key is not None and key != own:
                    self._stands_for[key] = self._stands_for.get(own, own)
        given, made = list(tensors_in((args, kwargs))), list(tensors_in(result))
        side = result_side(op, map(self.side_of, given))
        self.follow(made, [side] * len(made))
        self.secondary.update(key for key in map(storage_key, made[1:]) if key is not None)
        for tensor in given:
            with suppress(RuntimeError):  # (a view of something written to since)
                node = grad_fn_of(tensor)
                if node is not None:
                    self._edge_sides[(node._sequence_nr(), tensor.output_nr)] = self.side_of(tensor)
        changed = list(written(op, args, kwargs))
        self.follow(changed, [side] * len(changed))
        if self.alive_log is not None:
            self.alive_log.append(self.alive_bytes())
        if self.listening:
            self._record(op, args, kwargs, result, given, changed)
        return result

    # -- backward: what each op is for ---------------------------------------------------------------------------------

    def _record(self, op: Any, args: Any, kwargs: Any, result: Any, given: list[Tensor], changed: list[Tensor]) -> None:
        node = torch._C._current_autograd_node()
        flat = flat_outputs(result)
        outputs = tuple(None if o is None else describe(o) for o in flat)
        number = len(self.ops)
        self.ops.append(
            _Running(
                op,
                as_metas(args),
                as_metas(kwargs),
                outputs,
                self.recomputing,
                None if node is None else node._sequence_nr(),
                node is None or node._sequence_nr() not in self._entered,
                [None] * len(outputs),
                self.alive_bytes(),
                frozenset(number for number, tensor in enumerate(given) if self._was_there(tensor)),
            )
        )
        # (What has nothing of its arguments' values carries nothing on: a dropout's mask is no part of a gradient.)
        through: frozenset[Mark] = frozenset().union(*(self._marks_of(t) for t in given if not makes_constant(op)))
        for position, tensor in enumerate(flat):
            if isinstance(tensor, Tensor):
                self._mark(tensor, through | {(number, position)})
        for tensor in changed:
            self._mark(tensor, through | {(number, 0)})

    def _was_there(self, tensor: Tensor) -> bool:
        key = storage_key(tensor)
        return key is not None and key in self.storages and key not in self.alive and key not in self.incoming

    def _marks_of(self, tensor: Tensor) -> frozenset[Mark]:
        key = storage_key(tensor)
        return self._marks.get(id(tensor) if key is None else key, frozenset())

    def _mark(self, tensor: Tensor, marks: frozenset[Mark]) -> None:
        key = storage_key(tensor)
        key = id(tensor) if key is None else key
        self._marks[key] = self._marks.get(key, frozenset()) | marks

    @contextmanager
    def watching_nodes(self) -> Iterator[None]:
        """Hook every node that autograd's engine is about to run, also in backward runs inside the backward."""
        run = torch.autograd._engine_run_backward  # type: ignore[attr-defined]

        def run_hooked(t_outputs: Any, *args: Any, **kwargs: Any) -> Any:
            for output in t_outputs:
                node = output.node if isinstance(output, torch.autograd.graph.GradientEdge) else output.grad_fn
                if node is not None:
                    self._hook(node)
            return run(t_outputs, *args, **kwargs)

        with mock.patch.object(torch.autograd, "_engine_run_backward", run_hooked):
            yield

    def _hook(self, root: Any) -> None:
        stack = [root]
        while stack:
            node = stack.pop()
            is_leaf = hasattr(node, "variable") and not node.next_functions
            if is_leaf:
                side = self._leaf_side(node)
                node.register_prehook(lambda gradients, side=side: self._landed(gradients, [side], done=None))
                continue
            number = node._sequence_nr()
            if number in self._hooked:
                continue
            self._hooked.add(number)
            sides = self._slot_sides(node, number)
            node.register_prehook(lambda _, number=number: self._entered.add(number))
            node.register_hook(
                lambda gradients, _, sides=sides, number=number: self._landed(gradients, sides, done=number)
            )
            stack.extend(fn for fn, _ in node.next_functions if fn is not None)

    def _slot_sides(self, node: Any, number: int) -> list[Side | None]:
        known = self._function_sides.get(number)
        edges = node.next_functions
        if known is not None and len(known) == len(edges):
            return list(known)
        return [
            None
            if fn is None
            else self._leaf_side(fn)
            if hasattr(fn, "variable") and not fn.next_functions
            else self._edge_sides.get((fn._sequence_nr(), nr), Side.DATA)
            for fn, nr in edges
        ]

    def _leaf_side(self, node: Any) -> Side:
        """A leaf is a parameter, unless user code detached it from something else."""
        return self.side_of(node.variable)

    def _landed(self, gradients: Any, sides: Sequence[Side | None], *, done: int | None) -> None:
        """Gradients arrived in slots: whatever unfinished op they came through is for those slots.

        A gradient towards a constant that was made to need one is no grad_weight.
        """
        for gradient, made_from in zip(gradients, sides, strict=False):
            if not isinstance(gradient, Tensor) or made_from is None:
                continue
            side = Side.WEIGHT if made_from is Side.WEIGHT else Side.DATA
            for number, position in self._marks_of(gradient):
                op = self.ops[number]
                if not op.done:
                    op.sides[position] = max(op.sides[position] or side, side)
        if done is not None:
            for op in self.ops:
                if op.node == done:
                    op.done = True

    # -- results -------------------------------------------------------------------------------------------------------

    def take(self) -> tuple[RanOp, ...]:
        """The ops recorded since the last call."""
        taken = tuple(
            RanOp(o.op, o.args, o.kwargs, o.outputs, tuple(o.sides), o.recomputed, o.node, o.alive, o.saved)
            for o in self.ops
        )
        self.ops = []
        self._marks.clear()
        return taken

    @contextmanager
    def recompute(self) -> Iterator[None]:
        """What runs inside is forward work done again."""
        before, self.recomputing = self.recomputing, True
        try:
            yield
        finally:
            self.recomputing = before


def as_metas(value: Any) -> Any:
    """``value`` with every tensor replaced by its `TensorMeta`."""
    if isinstance(value, Tensor):
        return describe(value)
    if isinstance(value, (tuple, list)):
        items = [as_metas(item) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return {key: as_metas(item) for key, item in value.items()}
    return value
