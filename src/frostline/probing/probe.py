"""Asking autograd about one call: what it saves, which backward ops run, which gradient each of them is for."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from frostline.kernels import LeanKernels, eager_kernels, settle, watched_kernels
from frostline.probing.attribution import RanOp, Recording, storage_key
from frostline.probing.replay import Receiver, Stage, perform, seed
from frostline.tracing.calls import Call, Side, Slot, TensorHook, TensorMeta, describe, tensors_in
from frostline.tracing.environment import is_here, let_go_of, undisturbed
from frostline.tracing.graph import Unit
from frostline.tracing.interception import observed_by
from frostline.tracing.recorder import autocast
from frostline.tracing.stand_ins import shrunk_call, stand_in

_REAL_LIMIT = 96 << 20  # bytes of tensors a probe may hold to be run for real
_REAL_LIMIT_IN_DOUBT = 1 << 30  # ... where a fake kernel was seen to be wrong at a smaller size


@dataclass(frozen=True, slots=True)
class Held:
    """A storage that autograd keeps after the call: an ``"input"``'s, an ``"output"``'s, or a ``"new"`` one's.

    ``secondary``: a kernel's second or later result (a workspace, say), whose size its fake may not know.
    ``covers``: what is held instead, in its place, if something else holds that anyway (`frostline.kernels.holders`).
    """

    kind: str
    index: int
    nbytes: int
    secondary: bool = False
    covers: tuple[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Gradient:
    """Where the gradient towards input ``index`` lies.

    Attributes:
        given: in the memory of the gradient of this output (``output_nr`` for ops, else position); None: elsewhere.
        storage: tells the storages apart that backward made; -1: of something that was there before.
        nbytes: of that storage.
        fits: its strides are the input's, so that it can become a parameter's ``.grad`` as it is.
        stride: its strides; () of a sparse one.
        view: it is a view, whose base keeps the storage as well: autograd adds nothing to it in place.
    """

    index: int
    given: int | None
    storage: int
    nbytes: int
    fits: bool
    stride: tuple[int, ...] = ()
    view: bool = False


@dataclass(frozen=True, slots=True)
class Probe:
    """What one call does under one mask.

    Attributes:
        backward: the ops that backward ran.
        gradients: where the gradients that it left lie.
        forward: for torch calls: the ops this mask makes the forward run.
        defined: the inputs that got a gradient; ``sparse``: bytes of those that are sparse.
        refusal: why autograd would not run this, where it would not.
        by_values: it took the values of integer inputs to find out.
        lean: how many ops frostline's kernels ran.
        confirmed: False where a fake kernel's word about what it saves could not be checked on real tensors.
    """

    held: tuple[Held, ...] = ()
    backward: tuple[RanOp, ...] = ()
    forward: tuple[RanOp, ...] = ()
    defined: frozenset[int] = frozenset()
    sparse: tuple[tuple[int, int], ...] = ()
    refusal: str = ""
    by_values: bool = False
    confirmed: bool = True
    gradients: tuple[Gradient, ...] = ()
    lean: int = 0

    @property
    def reads_workspace(self) -> bool:
        """Whether backward may read what a kernel of the forward left for it: such ops cannot be run by themselves."""
        return any(held.secondary for held in self.held)


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of a call.

    Attributes:
        mask: the inputs that require grad while the forward runs.
        needed: the inputs whose gradients ``backward(inputs=...)`` asks for; None: ``backward()``.
        receives: which outputs get a gradient: ``output_nr`` for ops, positions for other calls.
        reached: the outputs, by position, whose nodes the loss keeps alive; None: all.
        strides: those of incoming gradients, by output as in ``receives``, where they are not the output's own.
    """

    mask: frozenset[int]
    needed: frozenset[int] | None
    receives: frozenset[int]
    reached: frozenset[int] | None = None
    strides: tuple[tuple[int, tuple[int, ...]], ...] = ()


@eager_kernels()
def probe(stage: Stage, unit: Unit, question: Question) -> Probe:
    """Replay ``unit`` and look. On fake tensors, and for real where a fake kernel cannot go or may not know."""
    try:
        found = _replay(stage, unit, question, real=False)
    except Exception as error:
        if not _can_be_real(unit):
            raise
        let_go_of(error)
        try:
            with undisturbed():
                return replace(_replay(stage, unit, question, real=True), by_values=True)
        except Exception:
            raise error from None
    if any(held.secondary for held in found.held):
        found = _confirmed(stage, unit, question, found)
    return found


def _can_be_real(unit: Unit, limit: int = _REAL_LIMIT) -> bool:
    total = sum(slot.meta.nbytes for slot in (*unit.inputs, *unit.call.outputs))
    return total <= limit and all(is_here(slot.meta.device) for slot in unit.inputs)


def _confirmed(stage: Stage, unit: Unit, question: Question, found: Probe) -> Probe:
    """Check on real tensors what a fake kernel said is saved; what is too large is checked at a smaller size."""
    forward_only = replace(question, receives=frozenset())
    if not _can_be_real(unit):
        small = _shrunk(unit)
        if small is not None and _can_be_real(small):
            real = _saved_for_real(stage, small, forward_only)
            if real is not None and real == _replay(stage, small, forward_only, real=False).held:
                return found
        if not _can_be_real(unit, _REAL_LIMIT_IN_DOUBT):
            return replace(found, confirmed=False)
    real = _saved_for_real(stage, unit, forward_only)
    return replace(found, confirmed=False) if real is None else replace(found, held=real)


@eager_kernels()
def real_gradients(stage: Stage, unit: Unit, question: Question) -> tuple[Gradient, ...] | None:
    """Where gradients lie that real kernels leave, which a fake one may not know; None: too large, or not to be run."""
    try:
        if _can_be_real(unit):
            with undisturbed():
                return _replay(stage, unit, question, real=True).gradients
    except Exception:  # made-up values may be refused
        pass
    return None


def _shrunk(unit: Unit) -> Unit | None:
    """The same question on smaller tensors; None if the unit is not a plain op."""
    if unit.call.kind != "op":
        return None
    call = shrunk_call(unit.call)
    return replace(unit, call=call, inputs=call.inputs, outputs=call.outputs)


def _saved_for_real(stage: Stage, unit: Unit, question: Question) -> tuple[Held, ...] | None:
    try:
        with undisturbed():
            return _replay(stage, unit, question, real=True).held
    except Exception:  # a kernel that refuses made-up values says nothing about what it saves
        return None


@eager_kernels()
def timed_probe(
    stage: Stage, unit: Unit, question: Question, runner: Callable[[Any, Any, Any], Any]
) -> tuple[RanOp, ...]:
    """Replay ``unit`` on real tensors with ``runner`` running every op that `Probe` lists; the ops, forward first."""
    with undisturbed():
        found = _replay(stage, unit, question, real=True, runner=runner)
    return (*found.forward, *found.backward)


def _replay(
    stage: Stage, unit: Unit, question: Question, *, real: bool, runner: Callable[[Any, Any, Any], Any] | None = None
) -> Probe:
    call = unit.call
    got: dict[int, Tensor] = {}
    recording = Recording()
    recording.runner = runner
    with _collection_paused(), nullcontext() if real else stage.fake_mode, torch.enable_grad(), autocast(call.autocast):
        inputs = _Inputs(unit, question.mask, got, real=real)
        tensors = inputs.take()
        if call.kind == "torch" and call.captured and call.autocast:
            tensors[len(call.inputs) :] = _cached_casts(unit, tensors)
        input_keys = [storage_key(t) for t in tensors]
        recording.follow(tensors, [slot.side for slot in unit.inputs])
        with _kernels(call) as run, _lent(stage, unit, tensors), observed_by(recording), recording:
            recording.listening = call.varies
            recording.count_anew()
            result = perform(call, tensors, recording)
            recording.listening = False
            forward = recording.take()
            outputs = list(tensors_in(result))
            output_keys = [storage_key(t) for t in outputs]
            edges, shapes, numbers = roots(call, outputs, question.receives)
            alive = range(len(outputs)) if question.reached is None else question.reached
            nodes = [owner(outputs[i]) for i in alive if i < len(outputs)]
            del result, outputs, tensors
            torch.clear_autocast_cache()  # (nested contexts clear it only when the outermost ends)
            held = _survivors(recording, input_keys, output_keys, inputs.leaves, is_user_code=call.kind != "op")
            if run is not None:
                held += _packed(run, input_keys, output_keys)
            refusal = ""
            origin: dict[int, int] = {}
            if edges and question.mask:
                strides = dict(question.strides)
                laid_out = (replace(m, stride=strides.get(n, m.stride)) for m, n in zip(shapes, numbers, strict=True))
                gradients = [stand_in(meta, real=real) for meta in laid_out]
                keys = map(storage_key, gradients)
                origin = {key: number for key, number in zip(keys, numbers, strict=True) if key is not None}
                recording.follow(gradients, [Side.DATA] * len(gradients))
                recording.incoming = set(origin)
                recording.count_anew()
                recording.listening = True
                with recording.watching_nodes():
                    targets = None if question.needed is None else inputs.targets(question.needed)
                    refusal = go_backward(edges, gradients, targets)
                recording.listening = False
    del nodes
    for index, leaf in inputs.leaves.items():
        if leaf.grad is not None:
            got[index] = leaf.grad
    sparse = tuple((i, g._indices().nbytes + g._values().nbytes) for i, g in got.items() if g.is_sparse)
    lie = tuple(_lies(index, got[index], unit.inputs[index], origin, recording) for index in sorted(got))
    lean = 0 if run is None else run.num_replaced
    return Probe(held, recording.take(), forward, frozenset(got), sparse, refusal, gradients=lie, lean=lean)


def _lies(index: int, gradient: Tensor, slot: Slot, origin: dict[int, int], recording: Recording) -> Gradient:
    key = storage_key(gradient)
    if key is None:  # sparse
        nbytes = gradient._indices().nbytes + gradient._values().nbytes
        return Gradient(index, None, index, nbytes, True)
    stride = tuple(map(int, gradient.stride())) if gradient.layout is torch.strided else ()
    made = list(recording.alive)
    storage = made.index(key) if key in recording.alive else -1
    nbytes, fits = gradient.untyped_storage().nbytes(), stride == slot.meta.stride
    return Gradient(index, origin.get(key), storage, nbytes, fits, stride, gradient._is_view())


@eager_kernels()
def probe_hook(stage: Stage, hook: TensorHook) -> tuple[RanOp, ...] | None:
    """The ops that a tensor hook runs on a gradient; None if it does not run on one without values."""
    recording = Recording()
    recording.listening = True
    try:
        with stage.fake_mode, torch.no_grad(), recording:
            hook.function(stand_in(hook.meta))
    except Exception:  # it may look at values
        return None
    return recording.take()


@contextmanager
def _collection_paused() -> Iterator[None]:
    """Keep what a replay makes in the youngest generation."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Inputs:
    """Stand-ins for a unit's inputs: one for each distinct tensor, needing a gradient where the mask says.

    Parameters that user code may look at stay leaves; all else is made to need a gradient by a Function of ours.
    """

    def __init__(self, unit: Unit, mask: frozenset[int], got: dict[int, Tensor], *, real: bool) -> None:
        self.leaves: dict[int, Tensor] = {}
        self.tokens: dict[int, Tensor] = {}
        self._receivers: list[Receiver] = []
        self._tensors: list[Tensor] = []
        by_value: dict[int, Tensor] = {}
        for index, slot in enumerate(unit.inputs):
            tensor = by_value.get(slot.value)
            if tensor is None:
                known = slot.known if real else None
                tensor = stand_in(slot.meta, real=real) if known is None else known.clone()
                if index in mask:
                    tensor = self._needing_grad(tensor, index, got, slot, leaf=slot.is_leaf and unit.call.kind != "op")
                by_value[slot.value] = tensor
            self._tensors.append(tensor)

    def _needing_grad(self, tensor: Tensor, index: int, got: dict[int, Tensor], slot: Slot, *, leaf: bool) -> Tensor:
        if leaf:
            self.leaves[index] = tensor.requires_grad_()
            return tensor
        seeded, self.tokens[index], receiver = seed(tensor, lambda gradient: got.__setitem__(index, gradient))
        self._receivers.append(receiver)
        return seeded

    def take(self) -> list[Tensor]:
        """The stand-ins; only the caller holds them from here on."""
        tensors, self._tensors = self._tensors, []
        return tensors

    def targets(self, needed: frozenset[int]) -> list[Tensor]:
        return [self.tokens.get(i, self.leaves.get(i)) for i in sorted(needed) if i in self.tokens or i in self.leaves]  # type: ignore[misc]


def _lent(stage: Stage, unit: Unit, tensors: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Put the stand-ins of parameters into the model: a Function may reach into a module, backward too."""
    call = unit.call
    if call.kind != "function" or not (call.captured or call.brings_objects):
        return nullcontext()
    slots = zip(unit.inputs, tensors, strict=True)
    return stage.lend({slot.edge[1]: t for slot, t in slots if slot.edge and slot.is_leaf})


def _kernels(call: Call) -> AbstractContextManager[LeanKernels | None]:
    return watched_kernels() if call.replaced else nullcontext()


def _cached_casts(unit: Unit, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Fill autocast's cache as the calls before this one did; returns what this one captured of it.

    Autocast keeps the cast of a weight that requires grad, so a later use captures it; a frozen weight is cast anew.
    """
    call = unit.call
    casts: list[Tensor] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = op(*args, **(kwargs or {}))
            if op is torch.ops.aten._to_copy.default and args[0] is weight:
                casts.append(result)
            return result

    found = list(tensors[len(call.inputs) :])
    source = {bits: t for bits, t, slot in zip(unit.behind, tensors, unit.inputs, strict=True) if slot.is_leaf}
    for position, bits in enumerate(unit.behind[len(call.inputs) :]):
        weight = source.get(bits)
        if weight is None or not weight.requires_grad or weight.dim() == 0:
            continue
        casts.clear()
        with Watch():  # type: ignore[no-untyped-call]
            torch.matmul(weight, weight.new_empty(weight.shape[-1], 1))
        if casts and describe(casts[0]) == call.captured[position].meta:
            found[position] = casts[0]
    return found


class _Cut(torch.autograd.Function):
    """Passes no gradient on; what lies behind is run all the same."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, _gradient: Tensor) -> None:
        return None


def roots(
    call: Call, outputs: list[Tensor], receives: frozenset[int]
) -> tuple[list[GradientEdge], list[TensorMeta], list[int]]:
    """Where backward starts, what the gradients handed in look like, and which outputs' they are."""
    edges: list[GradientEdge] = []
    shapes: list[TensorMeta] = []
    numbers: list[int] = []
    seen: set[tuple[int, int]] = set()
    for position, tensor in enumerate(outputs):
        if tensor.grad_fn is None:
            continue
        number = tensor.output_nr if call.kind == "op" else position
        key = (id(tensor.grad_fn), tensor.output_nr)
        if not receives and call.kind in ("function", "checkpoint"):  # reached, but by no defined gradient
            cut = _Cut.apply(tensor)  # type: ignore[no-untyped-call]
            edges.append(GradientEdge(cut.grad_fn, 0, owner(cut)))
            shapes.append(describe(tensor))
            numbers.append(number)
        elif number in receives and key not in seen:
            seen.add(key)
            edges.append(GradientEdge(tensor.grad_fn, tensor.output_nr, owner(tensor)))
            shapes.append(describe(tensor))
            numbers.append(number)
    return edges, shapes, numbers


def owner(tensor: Tensor) -> Any:
    """What keeps the node of a tensor alive: the node; of a Function's, which Python may not own, one behind it.

    Source: ``get_gradient_edge`` in torch/autograd/graph.py (2.11), which makes a view to that end.
    """
    node = tensor.grad_fn
    if not isinstance(node, torch._C._FunctionBase):
        return node
    return torch._C._functions.DelayedError("", 1)(tensor).grad_fn  # runs no op


def _survivors(
    recording: Recording,
    input_keys: list[int | None],
    output_keys: list[int | None],
    leaves: Any,
    *,
    is_user_code: bool,
) -> tuple[Held, ...]:
    """What stays alive when everything but autograd's nodes is dropped is what autograd holds."""
    refs: dict[int, StorageWeakRef] = recording.storages
    if is_user_code and any(not ref.expired() for ref in refs.values()):
        gc.collect(0)  # user code may have left reference cycles; with collection paused, they are all young
    held: list[Held] = []
    held_leaves = {storage_key(leaf) for leaf in leaves.values()}
    for order, (key, ref) in enumerate(refs.items()):
        if ref.expired() or key in held_leaves:
            continue
        kind, index = place_of(key, input_keys, output_keys) or ("new", order)
        nbytes = 0 if kind == "input" else recording.nbytes[key]
        held.append(Held(kind, index, nbytes, key in recording.secondary))
    return tuple(held)


def place_of(key: int, input_keys: list[int | None], output_keys: list[int | None]) -> tuple[str, int] | None:
    if key in input_keys:
        return ("input", input_keys.index(key))
    return ("output", output_keys.index(key)) if key in output_keys else None


def _packed(run: LeanKernels, input_keys: list[int | None], output_keys: list[int | None]) -> tuple[Held, ...]:
    """What our own kernels keep that no mode sees, some of it in place of a tensor: numbered from -1 down."""
    settle()
    packed = [holder for holder in run.holders() if holder.packed_nbytes]
    places = [(place_of(h.storage_key, input_keys, output_keys) or ("", 0), h.packed_nbytes) for h in packed]
    places += [(("", 0), nbytes) for nbytes in run.kept_aside()]
    return tuple(
        Held("new", -1 - number, nbytes, covers=place if place[0] else None)
        for number, (place, nbytes) in enumerate(sorted(places))
    )


def go_backward(roots: Any, gradients: Any, targets: list[Tensor] | None) -> str:
    """Run backward as the method would. Returns autograd's refusal, if it refuses.

    Args:
        targets: what ``backward(inputs=...)`` asks for; None: ``backward()``.
    """
    if targets == []:
        return ""
    try:
        if isinstance(roots, Tensor):
            torch.autograd.backward(roots, gradients, inputs=targets)
            return ""
        # What that ends in. In torch 2.11 it asks edges first what a node of the user's cannot say.
        engine: Any = torch.autograd._engine_run_backward  # type: ignore[attr-defined]
        given, asked = (tuple(roots), tuple(gradients)), tuple(targets or ())
        engine(*given, False, False, asked, allow_unreachable=True, accumulate_grad=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        return str(error).strip().splitlines()[0]
    return ""
