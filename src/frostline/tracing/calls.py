"""What a trace records: op calls, as metadata and wiring, never as tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import enable_reentrant_dispatch


class Side(IntEnum):
    """What a tensor was computed from; an op's result takes the greatest side among its arguments."""

    CONSTANT = 0  # factories and buffers
    WEIGHT = 1  # parameters (and constants) alone: its gradient is grad_weight
    DATA = 2  # the step's inputs, or random numbers: its gradient is grad_input


@dataclass(frozen=True, slots=True)
class TensorMeta:
    """What an op can know of a tensor without its values. ``stride`` is () for layouts that have none.

    ``lazy``: ``"conj"`` or ``"neg"`` for a view that torch conjugates or negates only where a kernel needs it.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str
    layout: torch.layout = torch.strided
    lazy: str = ""

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, each counted once (an expanded tensor holds fewer)."""
        return self.numel * self.dtype.itemsize


def describe(tensor: Tensor) -> TensorMeta:
    """The metadata of ``tensor``; works for fake, meta, sparse and subclassed tensors."""
    if tensor.is_nested:  # rows of different lengths: one long row, of a layout that no formula takes
        return TensorMeta((tensor.numel(),), (), tensor.dtype, str(tensor.device), torch.jagged)
    strided = tensor.layout is torch.strided
    return TensorMeta(
        tuple(map(int, tensor.shape)),
        tuple(map(int, tensor.stride())) if strided else (),
        tensor.dtype,
        str(tensor.device),
        tensor.layout,
        "conj" if tensor.is_conj() else "neg" if tensor.is_neg() else "",
    )


# Where a gradient flows to: (index of an autograd node in the tape, which of its outputs), or a leaf as (-1, index).
Edge = tuple[int, int]
NOWHERE: Edge = (-2, 0)  # of a view made under no_grad: it requires grad as its base does, and leads nowhere


@dataclass(slots=True)
class Slot:
    """One tensor at the moment an op call received or returned it."""

    meta: TensorMeta
    value: int  # which tensor object of the trace
    storage: int  # which storage of the trace
    side: Side = Side.CONSTANT
    edge: Edge | None = None  # None: no gradient flows to it
    known: Tensor | None = None  # the values of small integer tensors that are not fake: they may decide what runs

    @property
    def is_leaf(self) -> bool:
        return self.edge is not None and self.edge[0] == -1


@dataclass(frozen=True, slots=True)
class Hole:
    """Stands in a call's arguments where input number ``index`` goes."""

    index: int


Kind = Literal["op", "torch", "function", "checkpoint", "sequence"]


@dataclass(slots=True, eq=False)
class Call:
    """One recorded call.

    ``op``: an ATen (or custom) overload as it arrives below autograd. ``torch``: the torch function around ops.
    ``function``: ``autograd.Function.apply``. ``checkpoint``: a checkpointed region. ``sequence``: a run of calls that
    only together can be probed (see `alignment`). All but ops have ``children``: the calls that ran inside.
    """

    kind: Kind
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Slot]
    module: str
    grad_enabled: bool
    autocast: tuple[Any, ...] = ()
    outputs: list[Slot] = field(default_factory=list)
    output_spec: Any = None  # the structure of the result, with Holes for tensors
    children: list[Call] = field(default_factory=list)
    recompute: list[Call] = field(default_factory=list)  # reentrant checkpoint: what its backward runs again
    hooks: tuple[Any, Any] | None = None  # the user's saved-tensor hooks it ran under
    options: dict[str, Any] = field(default_factory=dict)  # a checkpoint's
    captured: list[Slot] = field(default_factory=list)  # tensors used inside that are not among the inputs
    first_node: int = 0  # autograd's sequence numbers while it ran: [first_node, end_node)
    end_node: int = 0
    order: int = -1  # of an op: how many ops ran before it
    opaque: bool = False  # a torch call that must be probed as a whole
    replaced: bool = False  # what autograd does with it is asked under frostline's own kernels
    replayable: bool = True  # False inside torch.func's transforms, whose tensors exist only there
    index: int = -1  # position among the tape's units

    @property
    def name(self) -> str:
        target = self.target
        if self.kind == "op":
            return str(target)
        if self.kind == "checkpoint":
            return "checkpoint"
        if self.kind == "sequence":
            return " + ".join(child.name for child in self.children)
        return getattr(target, "__qualname__", None) or getattr(target, "__name__", None) or str(target)

    @property
    def direct_tensors(self) -> list[Hole]:
        """The tensor arguments that are not inside a list: those a Function's node has a slot for."""
        return [arg for arg in self.args if isinstance(arg, Hole)]

    @property
    def brings_objects(self) -> bool:
        """Whether its arguments hold anything but tensors and plain values: a module, a closure."""
        try:
            freeze((self.args, self.kwargs))
        except TypeError:
            return True
        return False

    @property
    def is_region(self) -> bool:
        """Whether it returns nothing itself: its outputs are what it makes and others use."""
        return self.kind == "sequence" or (self.kind == "checkpoint" and not self.is_reentrant)

    @property
    def is_reentrant(self) -> bool:
        """Whether it is a checkpoint of the kind that is an autograd.Function."""
        return self.kind == "checkpoint" and isinstance(self.target, type)

    @property
    def varies(self) -> bool:
        """Whether the ops of its forward depend on the mask."""
        return self.kind in ("torch", "sequence")

    def ops(self) -> Iterator[Call]:
        """Every op call that ran inside, in order."""
        if self.kind == "op":
            yield self
        for child in self.children:
            yield from child.ops()


_PLAIN = (
    *(int, float, bool, complex, str, bytes, type(None)),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)


def freeze(value: Any) -> Any:
    """A hashable form of a call's arguments. Raises TypeError for objects whose state it cannot see."""
    if isinstance(value, Hole):
        return ("hole", value.index)
    if isinstance(value, (tuple, list)):
        return tuple(freeze(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, freeze(item)) for key, item in sorted(value.items()))
    if isinstance(value, torch.Generator):
        return "generator"
    if isinstance(value, _PLAIN):
        return (type(value).__name__, value)
    raise TypeError(f"{type(value).__name__} is not a plain value")


@dataclass(frozen=True, slots=True)
class TensorHook:
    """A function the user put on a tensor's gradient (``register_hook``)."""

    edge: Edge
    meta: TensorMeta
    function: Callable[[Any], Any]
    module: str
    closed_over: tuple[Slot, ...]


def template(value: Any, take: Callable[[Tensor], int]) -> Any:
    """``value`` with a `Hole` for every tensor; ``take`` is given each tensor and returns its input number."""
    if isinstance(value, Tensor):
        return Hole(take(value))
    if type(value) in (tuple, list):
        return type(value)(template(item, take) for item in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a named tuple, as torch.max returns
        return type(value)(*(template(item, take) for item in value))
    if isinstance(value, tuple):  # torch.return_types: built from one sequence
        return type(value)(template(item, take) for item in value)
    if isinstance(value, dict) and type(value) is dict:
        return {key: template(item, take) for key, item in value.items()}
    return value


def fill(value: Any, tensors: Any) -> Any:
    """Put ``tensors[i]`` where ``Hole(i)`` stands."""
    if isinstance(value, Hole):
        return tensors[value.index]
    if type(value) in (tuple, list):
        return type(value)(fill(item, tensors) for item in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(fill(item, tensors) for item in value))
    if isinstance(value, tuple):
        return type(value)(fill(item, tensors) for item in value)
    if isinstance(value, dict) and type(value) is dict:
        return {key: fill(item, tensors) for key, item in value.items()}
    return value


def grad_fn_of(tensor: Tensor) -> Any:
    """A tensor's node, asked for as above autograd, with grad on.

    The node of a view whose base was written to is made when it is asked for; where autograd is off just then, as it is
    inside a dispatch mode, some views would get none, for good. Source: ``VariableHooks::grad_fn`` in
    ``torch/csrc/autograd/variable.cpp``.
    """
    if not tensor._is_view():
        return tensor.grad_fn
    below = torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality)
    with torch.enable_grad(), enable_reentrant_dispatch() if below else nullcontext():
        return tensor.grad_fn


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors inside nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def flat_outputs(result: Any) -> tuple[Tensor | None, ...]:
    """What an op returned, lists among it laid out flat; an undefined output is None."""
    if isinstance(result, (tuple, list)):
        return tuple(each for item in result for each in flat_outputs(item))
    return (result,) if isinstance(result, Tensor) else (None,)


@functools.cache
def _aliased_arguments(op: Any) -> tuple[int | None, ...]:
    """Per result of an op: the argument it is a view of, or is, by its schema."""
    found: list[int | None] = []
    for returned in op._schema.returns:
        alias = returned.alias_info
        found.append(
            next(
                (
                    position
                    for position, argument in enumerate(op._schema.arguments)
                    if alias is not None
                    and argument.alias_info is not None
                    # (Of a list of views, as split's, only the argument knows: it may be aliased by anything.)
                    and (argument.alias_info.before_set & alias.before_set or "*" in argument.alias_info.after_set)
                ),
                None,
            )
        )
    return tuple(found)


def aliases(op: Any, result: Any) -> Iterator[tuple[int, Any]]:
    """The parts of ``result`` that share an argument's storage, each with that argument's position."""
    positions = _aliased_arguments(op)
    parts = (result,) if len(positions) == 1 else result
    for position, part in zip(positions, parts or (), strict=False):
        if position is not None:
            yield position, part


_VALUE_FREE = ("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty")


@functools.cache
def makes_constant(op: Any) -> bool:
    """Whether an op's result has nothing of its arguments' values: ``zeros_like``, ``torch.tensor`` and the like."""
    return bool(
        op.namespace == "aten" and op._schema.name.removeprefix("aten::").startswith((*_VALUE_FREE, "lift_fresh"))
    )


def result_side(op: Any, given: Iterable[Side]) -> Side:
    """What an op's result is made from, given what its arguments are."""
    if torch.Tag.nondeterministic_seeded in op.tags:
        return Side.DATA
    return Side.CONSTANT if makes_constant(op) else max(given, default=Side.CONSTANT)


def values_decide_shape(op: Call) -> bool:
    """Whether how much an op returns depends on values: ``nonzero``, indexing by a mask."""
    if torch.Tag.dynamic_output_shape not in op.target.tags:
        return False
    return "index" not in op.target._schema.name or any(slot.meta.dtype is torch.bool for slot in op.inputs)


UNSEEN = ("prim", "profiler")  # namespaces of ops that compute nothing


@functools.cache
def _written_arguments(op: Any) -> tuple[tuple[int, str], ...]:
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(op._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def written(op: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors that an op writes to, by its schema."""
    for position, name in _written_arguments(op):
        yield from tensors_in(args[position] if position < len(args) else kwargs.get(name))


@functools.cache
def is_view(op: Any) -> bool:
    """Whether an op only returns views of its arguments, by its schema."""
    returns = op._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
