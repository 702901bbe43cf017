"""Asking autograd about one call: what it saves, which backward ops run, which gradient each of them is for."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from frostline.probing.replay import Receiver, Stage, autocast, perform, seed, stand_in
from frostline.tracing.calls import Call, TensorMeta, describe, tensors_in
from frostline.tracing.graph import Unit


@dataclass(frozen=True, slots=True)
class BackwardOp:
    """One op call that backward ran. Tensors in ``args`` are `TensorMeta`."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[TensorMeta | None, ...]
    reaches: tuple[frozenset[int], ...]  # per output: the inputs of the call whose gradients it goes into
    recomputed: bool = False  # forward work done again by a checkpoint


@dataclass(frozen=True, slots=True)
class Held:
    """A storage that autograd keeps after the call: an input's, an output's, or one made inside."""

    kind: str  # "input", "output", "new"
    index: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Probe:
    """What one call does under one mask. ``error``: autograd's own refusal, where it gave one."""

    held: tuple[Held, ...] = ()
    backward: tuple[BackwardOp, ...] = ()
    defined: frozenset[int] = frozenset()  # inputs that got a gradient
    requires_grad: tuple[bool, ...] = ()  # of the outputs
    error: str = ""
    forward: tuple[BackwardOp, ...] = ()  # of torch calls probed as a whole: the ops this mask makes them run
    confirmed: bool = True  # False: its saved tensors could not be checked on real tensors


class _Recording(TorchDispatchMode):
    """Records the ops of a replay, and which of them each storage was made by."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[Any, Any, Any, Any, bool]] = []
        self.forward: tuple[BackwardOp, ...] = ()
        self.refs: dict[int, StorageWeakRef] = {}
        self.nbytes: dict[int, int] = {}
        self.recomputing = False
        self.listening = False
        self.output_marks: dict[int, frozenset[tuple[int, int]]] = {}

    def follow(self, tensors: Sequence[Tensor]) -> None:
        """Watch whether the storages of ``tensors`` stay alive."""
        for tensor in tensors:
            key = storage_key(tensor)
            if key is not None and key not in self.refs:
                self.refs[key] = StorageWeakRef(tensor.untyped_storage())
                self.nbytes[key] = tensor.untyped_storage().nbytes()

    def marks_of(self, tensor: Tensor) -> frozenset[tuple[int, int]]:
        key = storage_key(tensor)
        return self.output_marks.get(key, frozenset()) if key is not None else frozenset()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = op(*args, **kwargs)
        if op.namespace == "prim":
            return result
        given = list(tensors_in((args, kwargs)))
        made = list(tensors_in(result))
        self.follow(made)
        if self.listening:
            number = len(self.ops)
            through = frozenset().union(*(self.marks_of(t) for t in given)) if given else frozenset()
            flat = list(result) if isinstance(result, (tuple, list)) else [result]
            outputs = tuple(describe(o) if isinstance(o, Tensor) else None for o in flat)
            for position, tensor in enumerate(flat):
                if isinstance(tensor, Tensor):
                    self._mark(tensor, through | {(number, position)})
            if op._schema.is_mutable:
                for tensor in given:
                    if storage_key(tensor) in {storage_key(m) for m in made}:
                        continue
                    self._mark(tensor, through | {(number, 0)})
            self.ops.append((op, as_metas(args), as_metas(kwargs), outputs, self.recomputing))
        return result

    def end_forward(self) -> None:
        """Keep the ops recorded so far as the forward's, and start listening for the backward's."""
        self.forward = tuple(
            BackwardOp(op, args, kwargs, outputs, (frozenset(),) * len(outputs)) for op, args, kwargs, outputs, _ in self.ops
        )
        self.ops.clear()
        self.output_marks.clear()
        self.listening = False

    def _mark(self, tensor: Tensor, marks: frozenset[tuple[int, int]]) -> None:
        key = storage_key(tensor)
        if key is not None:
            self.output_marks[key] = self.output_marks.get(key, frozenset()) | marks

    @contextmanager
    def recompute(self) -> Iterator[None]:
        before, self.recomputing = self.recomputing, True
        try:
            yield
        finally:
            self.recomputing = before


def storage_key(tensor: Tensor) -> int | None:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return None


def as_metas(value: Any) -> Any:
    """``value`` with every tensor replaced by its `TensorMeta`."""
    if isinstance(value, Tensor):
        return describe(value)
    if isinstance(value, (tuple, list)):
        return type(value)(as_metas(item) for item in value) if type(value) in (tuple, list) else list(map(as_metas, value))
    if isinstance(value, dict):
        return {key: as_metas(item) for key, item in value.items()}
    return value


def probe(
    stage: Stage, unit: Unit, mask: frozenset[int], needed: frozenset[int], receives: frozenset[int], *, confirm: bool = True
) -> Probe:
    """Replay ``unit`` with the inputs in ``mask`` requiring grad, and go backward to those in ``needed``.

    Args:
        receives: which outputs get a gradient: ``output_nr`` for ops, positions for other calls.
        confirm: check what is saved on real tensors where a fake kernel may not know it.
    """
    with stage.fake_mode:
        found = _replay(stage, unit, mask, needed, receives, real=False)
    if confirm and _doubtful(unit, found):
        found = _confirmed(stage, unit, mask, found)
    return found


_REAL_LIMIT = 96 << 20  # bytes of tensors a probe may hold to be confirmed for real


def _doubtful(unit: Unit, found: Probe) -> bool:
    """A kernel that saves something besides its arguments and its first result: its fake may not know how large."""
    return unit.call.kind == "op" and any(h.kind == "new" or (h.kind == "output" and h.index > 0) for h in found.held)


def _confirmed(stage: Stage, unit: Unit, mask: frozenset[int], found: Probe) -> Probe:
    total = sum(slot.meta.nbytes for slot in (*unit.inputs, *unit.call.outputs))
    if total > _REAL_LIMIT or any(slot.meta.device != "cpu" for slot in unit.inputs):
        return replace(found, confirmed=False)
    try:
        with torch.random.fork_rng(devices=[]):
            real = _replay(stage, unit, mask, frozenset(), frozenset(), real=True)
    except Exception:  # a kernel that refuses made-up values says nothing about what it saves
        return replace(found, confirmed=False)
    return replace(found, held=real.held)


def _replay(
    stage: Stage, unit: Unit, mask: frozenset[int], needed: frozenset[int], receives: frozenset[int], *, real: bool
) -> Probe:
    call = unit.call
    got: dict[int, Tensor] = {}
    recording = _Recording()
    with torch.enable_grad(), autocast(call.autocast):
        leaves, tensors, tokens, receivers = _inputs(unit, mask, got, real=real)
        if call.kind == "torch" and call.captured and call.autocast:
            tensors[len(call.inputs) :] = _cached_casts(call, tensors)
        input_keys = [storage_key(t) for t in tensors]
        recording.follow(tensors)
        with recording:
            recording.listening = call.kind == "torch"
            result = _perform_in_model(stage, unit, tensors, recording)
            recording.end_forward()
            outputs = list(tensors_in(result))
            output_keys = [storage_key(t) for t in outputs]
            requires_grad = tuple(t.requires_grad for t in outputs)
            edges, gradients = _roots(call, outputs, receives)
            nodes = [t.grad_fn for t in outputs if t.grad_fn is not None]
            del result, outputs, tensors
            if call.autocast:
                torch.clear_autocast_cache()
            held = _survivors(recording, input_keys, output_keys, leaves, is_user_code=call.kind != "op")
            error = ""
            if edges and needed:
                recording.listening = True
                error = _go_backward(edges, gradients, tokens, leaves, needed, mask)
                recording.listening = False
    del nodes, receivers
    for index, leaf in leaves.items():
        if leaf.grad is not None:
            got[index] = leaf.grad
    return Probe(held, _attributed(recording, got), frozenset(got), requires_grad, error, forward=recording.forward)


def _inputs(unit: Unit, mask: frozenset[int], got: dict[int, Tensor], *, real: bool) -> Any:
    """Stand-ins for the unit's inputs: one for each distinct tensor, needing a gradient where the mask says."""
    call = unit.call
    by_value: dict[int, Tensor] = {}
    leaves: dict[int, Tensor] = {}
    tokens: dict[int, Tensor] = {}
    receivers: list[Receiver] = []
    tensors: list[Tensor] = []
    for index, slot in enumerate(unit.inputs):
        tensor = by_value.get(slot.value)
        if tensor is None:
            tensor = stand_in(slot.meta, real=real)
            if index in mask:
                if slot.is_leaf and call.kind != "op":
                    tensor.requires_grad_()
                    leaves[index] = tensor
                else:
                    tensor, tokens[index], receiver = seed(tensor, lambda g, i=index: got.__setitem__(i, g))
                    receivers.append(receiver)
            by_value[slot.value] = tensor
        tensors.append(tensor)
    return leaves, tensors, tokens, receivers


def _perform_in_model(stage: Stage, unit: Unit, tensors: Sequence[Tensor], recording: _Recording) -> Any:
    call = unit.call
    captured = tensors[len(call.inputs) :]
    if call.kind == "function" and captured and stage.lend is not None:
        leaves = {slot.edge[1]: t for slot, t in zip(call.captured, captured, strict=True) if slot.edge and slot.is_leaf}
        with stage.lend(leaves):
            return perform(call, tensors, recording.recompute)
    return perform(call, tensors, recording.recompute)


def _cached_casts(call: Call, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Fill autocast's cache as the calls before this one did, by running it once; returns what it captured.

    Autocast keeps the cast of a weight that requires grad, so a later use captures it; a frozen weight is cast anew.
    """
    casts: list[tuple[int, Tensor]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = op(*args, **(kwargs or {}))
            if op is torch.ops.aten._to_copy.default:
                casts.append((id(args[0]), result))
            return result

    with Watch():
        perform(call, tensors)
    found = list(tensors[len(call.inputs) :])
    for position, slot in enumerate(call.captured):
        for _, cast in casts:
            if describe(cast) == slot.meta and cast.requires_grad and all(cast is not f for f in found):
                found[position] = cast
                break
    return found


def _roots(call: Call, outputs: list[Tensor], receives: frozenset[int]) -> tuple[list[GradientEdge], list[Tensor]]:
    edges: list[GradientEdge] = []
    gradients: list[Tensor] = []
    seen: set[tuple[int, int]] = set()
    for position, tensor in enumerate(outputs):
        if tensor.grad_fn is None:
            continue
        number = tensor.output_nr if call.kind == "op" else position
        key = (id(tensor.grad_fn), tensor.output_nr)
        if number in receives and key not in seen:
            seen.add(key)
            edges.append(GradientEdge(tensor.grad_fn, tensor.output_nr))
            gradients.append(torch.empty_like(tensor))
    return edges, gradients


def _survivors(
    recording: _Recording, input_keys: list[int | None], output_keys: list[int | None], leaves: Any, *, is_user_code: bool
) -> tuple[Held, ...]:
    """What stays alive when everything but autograd's nodes is dropped is what autograd holds."""
    if is_user_code and any(not ref.expired() for ref in recording.refs.values()):
        gc.collect()  # user code may have left reference cycles
    held: list[Held] = []
    held_leaves = {storage_key(leaf) for leaf in leaves.values()}
    for order, (key, ref) in enumerate(recording.refs.items()):
        if ref.expired() or key in held_leaves:
            continue
        if key in input_keys:
            held.append(Held("input", input_keys.index(key), 0))
        elif key in output_keys:
            held.append(Held("output", output_keys.index(key), recording.nbytes[key]))
        else:
            held.append(Held("new", order, recording.nbytes[key]))
    return tuple(held)


def _go_backward(
    edges: list[GradientEdge],
    gradients: list[Tensor],
    tokens: dict[int, Tensor],
    leaves: dict[int, Tensor],
    needed: frozenset[int],
    mask: frozenset[int],
) -> str:
    """Run backward towards the needed inputs. Returns autograd's refusal, if it refuses."""
    targets = [tokens[i] for i in sorted(needed) if i in tokens] + [leaves[i] for i in sorted(needed) if i in leaves]
    everything = needed >= mask
    try:
        if everything:  # as loss.backward() does
            torch.autograd.backward(edges, gradients)
        elif targets:  # as loss.backward(inputs=...) does
            torch.autograd.backward(edges, gradients, inputs=targets)
    except RuntimeError as refusal:
        if "incompatible" not in str(refusal):
            raise
        return str(refusal)
    return ""


def _attributed(recording: _Recording, got: dict[int, Tensor]) -> tuple[BackwardOp, ...]:
    """Give every output of every backward op the gradients it went into."""
    reached: dict[tuple[int, int], set[int]] = {}
    for index, gradient in got.items():
        for mark in recording.marks_of(gradient):
            reached.setdefault(mark, set()).add(index)
    result = []
    for number, (op, args, kwargs, outputs, recomputed) in enumerate(recording.ops):
        reaches = tuple(frozenset(reached.get((number, p), ())) for p in range(len(outputs)))
        result.append(BackwardOp(op, args, kwargs, outputs, reaches, recomputed))
    return tuple(result)
