"""Recording one run of a step: every op call below autograd, and the calls that enclose them.

Two modes feed one recorder. The torch-function mode sees what the user's code calls (``F.linear``), the dispatch mode
what that becomes below autograd (``aten.t``, ``aten.addmm``). `interception` adds ``Function.apply`` and checkpoints.
Tensors are kept as numbers: which object (value), which storage, which edge of autograd's graph.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from frostline.errors import TraceError
from frostline.kernels import users_hooks
from frostline.tracing.calls import (
    NOWHERE,
    UNSEEN,
    Call,
    Edge,
    Side,
    Slot,
    TensorHook,
    TensorMeta,
    aliases,
    describe,
    grad_fn_of,
    result_side,
    template,
    tensors_in,
    written,
)
from frostline.tracing.environment import devices_here
from frostline.tracing.interception import is_reentrant_checkpoint, observed_by
from frostline.tracing.layouts import with_true_layout

_set_requires_grad = Tensor.requires_grad.__set__  # type: ignore[attr-defined]
_FEW = 1 << 16  # elements of integer tensors whose values are kept
_SMALL_NUMEL = 1 << 24  # ops on known values run for real up to this size
_FLAG_CHANGES = {Tensor.requires_grad_, _set_requires_grad, Tensor.detach_, torch.detach_}
_MUTED_FUNCTIONS = {Tensor.requires_grad_, _set_requires_grad, Tensor.retain_grad, Tensor.register_hook}


def autocast_state() -> tuple[Any, ...]:
    """Whether autocast is on for the CPU and for the accelerator, its dtypes, and whether it caches casts."""
    if not torch._C._is_any_autocast_enabled():
        return ()
    return (
        *((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices_here()),
        torch.is_autocast_cache_enabled(),
    )


@contextmanager
def autocast(state: tuple[Any, ...]) -> Iterator[None]:
    """The autocast state that `autocast_state` returned; () is none."""
    with ExitStack() as stack:
        if not state:
            for device in devices_here():
                stack.enter_context(torch.autocast(device, enabled=False))
        else:
            *devices, cache = state
            for device, enabled, dtype in devices:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache))
        yield


def let_go(_tensor: Tensor) -> None:
    """The saved-tensor hook of a real forward that is only watched: nothing is kept."""


class Recorder:
    """Collects the tape of one run. See `recording`.

    Args:
        keep: hold on to every tensor seen (fake tensors: they have no memory). Otherwise tensors are followed by weak
            references, as the one real forward needs.
        module_names: the name of each module, by ``id``.
        frozen: nothing trains in this run, which is recorded to be compared with the one where everything does: what a
            reentrant checkpoint would run again is then recorded all the same.
    """

    def __init__(self, *, keep: bool, module_names: dict[int, str], frozen: bool = False) -> None:
        self.root = Call("torch", None, (), {}, [], "", True)
        self.current = self.root
        self.module_names = module_names
        self.frozen = frozen
        self.module_stack: list[str] = [""]
        self.failed: tuple[BaseException, str] | None = None  # the last exception, and the module it was raised in
        self.nodes: list[Any] = []  # autograd nodes, kept alive so that their ids stay theirs
        self.leaves: list[Tensor] = []
        self.storage_bytes: list[int] = []
        self.storage_refs: dict[int, StorageWeakRef] = {}  # by address, which they keep from being used again
        self.sides: list[Side] = []
        self.entangled = ""  # what was seen that makes autograd do more than single calls can tell
        self.tensor_hooks: list[TensorHook] = []
        self._in_checkpoint = False  # one of the kind that has saved-tensor hooks
        self._in_region = False
        self._pending: list[tuple[Call, tuple[Any, ...]]] = []
        self.function_nodes: dict[int, Call] = {}  # node index -> the call that made it
        self.always_edges: set[Edge] = set()  # `requires_grad_()` was called on their tensors
        self.used: set[int] = set()  # tensors that an op has taken
        self.num_values = 0
        self.num_ops = 0
        self.died: dict[int, int] = {}  # storage -> the op (by order) before which it was let go; if nothing is kept
        self._living: dict[int, StorageWeakRef] = {}  # by address
        self._kept: list[Tensor] | None = [] if keep else None
        self._values: dict[int, tuple[int, Any]] = {}
        self._node_index: dict[int, int] = {}
        self._leaf_index: dict[int, int] = {}
        self._storage_index: dict[int, int] = {}
        self._without_storage: dict[int, tuple[int, Any]] = {}
        self._known: dict[int, tuple[int, Tensor]] = {}
        self._metas: dict[TensorMeta, TensorMeta] = {}
        self.lent: dict[int, torch.UntypedStorage] = {}  # the user's own storages, by address
        self.backups: dict[int, torch.UntypedStorage] = {}  # what those that were written to held before
        self.own: set[int] = set()  # storages lent to or made during the run: may be changed in place for real
        self.unknown: set[int] = set()  # storages of real tensors whose values are not what a real run would hold

    def living(self) -> Iterator[tuple[int, int, Tensor]]:
        """Every tensor seen that still lives, as it is asked for: its number, its storage's, and itself."""
        assert self._kept is None, "this recorder keeps every tensor itself"
        for number, ref in list(self._values.values()):
            tensor = ref()
            if tensor is not None:
                yield number, self.storage_of(tensor, Side.DATA), tensor
            del tensor  # a reader of references counts no reference of ours

    def number_of(self, address: int) -> int:
        """The number of the storage at an address of `storage_refs`."""
        return self._storage_index[address]

    def forget_graph(self) -> None:
        """Let go of all that could keep a tensor alive: nodes, leaves, and objects that calls were given."""
        self.root = self.current = Call("torch", None, (), {}, [], "", True)
        self.nodes, self.leaves, self.function_nodes = [], [], {}
        self.tensor_hooks, self._pending, self.failed = [], [], None

    # -- tensors as numbers ------------------------------------------------------------------------------------------

    def value_of(self, tensor: Tensor) -> int:
        known = self._values.get(id(tensor))
        if known is not None and (self._kept is not None or known[1]() is tensor):
            return known[0]
        number = self.num_values
        self.num_values += 1
        if self._kept is not None:
            self._kept.append(tensor)
            self._values[id(tensor)] = (number, None)
        else:
            self._values[id(tensor)] = (number, weakref.ref(tensor))
        return number

    def storage_of(self, tensor: Tensor, side: Side) -> int:
        """The number of the tensor's storage; one not seen before starts with ``side``."""
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse, or a wrapper without a storage of its own
            return self._storage_of_parts(tensor, side)
        number = self._storage_index.get(storage._cdata)
        if number is None:
            number = self._storage_index[storage._cdata] = len(self.storage_bytes)
            self.storage_bytes.append(0 if tensor._is_zerotensor() else storage.nbytes())  # (a tangent of zeros)
            self.storage_refs[storage._cdata] = self._living[storage._cdata] = StorageWeakRef(storage)
            self.sides.append(side)
        return number

    def note_deaths(self) -> None:
        """See which storages were let go since the last op."""
        if self._kept is None:
            for address in [address for address, ref in self._living.items() if ref.expired()]:
                del self._living[address]
                self.died[self._storage_index[address]] = self.num_ops

    def alias(self, result: Any, number: int) -> None:
        """Give what an op returned of one of its arguments that argument's storage number.

        The fake mode's stand-in for a real tensor has a storage of its own.
        """
        for tensor in tensors_in(result):
            try:
                storage = tensor.untyped_storage()
            except (NotImplementedError, RuntimeError):
                continue
            if storage._cdata not in self._storage_index:
                self._storage_index[storage._cdata] = number
                self.storage_refs[storage._cdata] = StorageWeakRef(storage)

    def _storage_of_parts(self, tensor: Tensor, side: Side) -> int:
        number, known = self._without_storage.get(id(tensor), (-1, None))
        if known is None or known() is not tensor:
            number = len(self.storage_bytes)
            self._without_storage[id(tensor)] = (number, weakref.ref(tensor))
            self.storage_bytes.append(0)
            self.sides.append(side)
        return number

    def is_known(self, tensor: Tensor) -> bool:
        """Whether a tensor that is not fake holds what it would in a real run."""
        return self.storage_of(tensor, Side.DATA) not in self.unknown

    def edge_of(self, tensor: Tensor) -> Edge | None:
        if not tensor.requires_grad:
            return None
        try:
            node = grad_fn_of(tensor)
        except RuntimeError:  # a view of something written to since: autograd would refuse to use it
            return None
        if node is None and tensor._base is not None and tensor._base.requires_grad:
            return NOWHERE
        if node is None:
            return (-1, self._leaf(tensor))
        return (self._node(node), tensor.output_nr)

    def _leaf(self, tensor: Tensor) -> int:
        number = self._leaf_index.get(id(tensor))
        if number is None:
            number = self._leaf_index[id(tensor)] = len(self.leaves)
            self.leaves.append(tensor)
        return number

    def _node(self, node: Any) -> int:
        number = self._node_index.get(id(node))
        if number is None:
            number = self._node_index[id(node)] = len(self.nodes)
            self.nodes.append(node)
        return number

    def slot(self, tensor: Tensor, side: Side = Side.DATA) -> Slot:
        """``side`` is that of a tensor never seen before: one from outside is data."""
        meta = describe(tensor)
        meta = self._metas.setdefault(meta, meta)
        storage = self.storage_of(tensor, side)
        value = self.value_of(tensor)
        return Slot(meta, value, storage, self.sides[storage], self.edge_of(tensor), self._values_of(tensor, value))

    def _values_of(self, tensor: Tensor, value: int) -> Tensor | None:
        if tensor.is_floating_point() or tensor.is_complex() or isinstance(tensor, FakeTensor):
            return None
        if tensor.layout is not torch.strided or tensor.is_nested or tensor.numel() > _FEW:
            return None
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or tensor.device.type == "meta":
            return None
        version, kept = self._known.get(value, (-1, None))
        if kept is None or version != tensor._version:
            with _disable_current_modes():  # (what is looked at is no part of the step)
                kept = tensor.detach().clone()
            self._known[value] = (tensor._version, kept)
        return kept

    def seal(self, tensors: Iterator[Tensor], side: Side) -> None:
        """Say what tensors that exist before the run are: parameters, buffers, inputs."""
        for tensor in tensors:
            self.sides[self.storage_of(tensor, side)] = side

    def back_up(self, tensors: Iterator[Tensor], *, everything: bool) -> None:
        """Keep what storages hold that are about to be written to for real.

        Args:
            everything: all that the run did not make, such as a tensor in a closure; else what was lent to it.
        """
        for tensor in tensors:
            if tensor.layout is not torch.strided or tensor.is_nested:
                continue
            storage = tensor.untyped_storage()
            foreign = everything and self.storage_of(tensor, Side.DATA) not in self.own
            if (foreign or storage._cdata in self.lent) and storage._cdata not in self.backups:
                self.lent[storage._cdata] = storage
                with unset_fake_temporarily():
                    self.backups[storage._cdata] = storage.clone()

    def give_back(self) -> None:
        """Put into the user's storages what they held."""
        for address, backup in self.backups.items():
            self.lent[address].copy_(backup)
        self.backups.clear()

    # -- calls -------------------------------------------------------------------------------------------------------

    def begin(self, kind: Any, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        inputs: list[Slot] = []

        def take(tensor: Tensor) -> int:
            inputs.append(self.slot(tensor))
            return len(inputs) - 1

        call = Call(kind, target, (), {}, inputs, self.module_stack[-1], torch.is_grad_enabled())
        if kind == "op":
            self.note_deaths()
            call.order = self.num_ops
            self.num_ops += 1
        call.args = template(args, take)
        call.kwargs = template(kwargs, take)
        if call.grad_enabled:
            hooks = users_hooks()
            if hooks is not None and hooks[0] is not let_go and not self._in_checkpoint:
                call.hooks = hooks
            if kind != "torch" and any(slot.edge == NOWHERE for slot in inputs):
                self.entangled = "a view made under no_grad is used outside it"
        if kind == "op":
            self.used.update(slot.value for slot in inputs)
        call.first_node = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        return call

    def end(self, call: Call, result: Any, side: Side) -> None:
        outputs = call.outputs

        def take(tensor: Tensor) -> int:
            outputs.append(self.slot(tensor, side))
            return len(outputs) - 1

        call.output_spec = template(result, take)
        call.end_node = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]

    @contextmanager
    def _region(self, inside: bool) -> Iterator[None]:
        """Whether what runs is inside a checkpoint, whose ops are run again from the record."""
        around, self._in_region = self._in_region, inside
        try:
            yield
        finally:
            self._in_region = around

    @contextmanager
    def inside(self, call: Call) -> Iterator[None]:
        parent, self.current = self.current, call
        try:
            yield
        finally:
            self.current = parent

    # -- interception.Observer -----------------------------------------------------------------------------------------

    def on_apply(self, cls: type, args: tuple[Any, ...], run: Callable[..., Any]) -> Any:
        reentrant = is_reentrant_checkpoint(cls)
        call = self.begin("checkpoint" if reentrant else "function", cls, args, {})
        call.autocast = autocast_state()
        if reentrant:
            call.captured = [self.slot(t) for t in tensors_in(_closed_over(args[0]))]
        with self.inside(call), self._region(reentrant or self._in_region):
            result = run(*args)
        if reentrant and any(map(_switches_grad_on, call.ops())):
            self.entangled = "grad is switched on inside a reentrant checkpoint"
        side = max((s.side for s in call.inputs), default=Side.CONSTANT)
        side = max([side, *(s.side for op in call.ops() for s in op.inputs)])
        self.end(call, result, side)
        for tensor in tensors_in(result):
            node = grad_fn_of(tensor)
            if node is not None:
                self.function_nodes[self._node(node)] = call
        if reentrant and torch.is_grad_enabled() and (self.frozen or any(slot.edge for slot in call.inputs)):
            self._pending.append((call, args))
        self.current.children.append(call)
        return result

    def finish(self) -> None:
        """Record what backward would run again, once the step is over and autocast's cache is empty as it is then."""
        while self._pending:
            call, args = self._pending.pop()
            with autocast(call.autocast):
                self._record_recompute(call, args)

    def _record_recompute(self, call: Call, args: tuple[Any, ...]) -> None:
        """What the backward of a reentrant checkpoint runs again: its function with grad on, on detached inputs."""
        function, _, *given = args
        again = Call("checkpoint", call.target, (), {}, [], call.module, True)
        self.module_stack.append(call.module)
        with self.inside(Call("torch", None, (), {}, [], "", True)):  # (the detaching itself is not part of it)
            detached = [a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in given]
        again.inputs = [self.slot(a) for a in detached if isinstance(a, Tensor)]
        with self.inside(again), torch.enable_grad():
            result = function(*detached)
        self.end(again, result, Side.DATA)
        call.recompute = [again]
        self.module_stack.pop()

    @contextmanager
    def checkpoint_region(
        self, function: Callable[..., Any], options: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[None]:
        call = self.begin("checkpoint", torch.utils.checkpoint.checkpoint, (args, _closed_over(function)), kwargs)
        call.autocast = autocast_state()
        call.options = options
        around, self._in_checkpoint = self._in_checkpoint, True
        try:
            with self.inside(call), self._region(True):
                yield
        finally:
            self._in_checkpoint = around
        call.end_node = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        self.current.children.append(call)

    def run_again(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return function

    def note_hook(self, tensor: Tensor, function: Callable[[Any], Any]) -> None:
        edge = self.edge_of(tensor)
        if edge is not None:
            closed_over = tuple(self.slot(t) for t in _closed_over(function))
            self.tensor_hooks.append(TensorHook(edge, describe(tensor), function, self.module_stack[-1], closed_over))

    def on_module(self, module: nn.Module, run: Callable[[], Any]) -> Any:
        depth = len(self.module_stack)
        self.module_stack.append(self.module_names.get(id(module), self.module_stack[-1]))
        try:
            return run()
        except BaseException as error:
            if self.failed is None or self.failed[0] is not error:  # the innermost module it came through
                self.failed = (error, self.module_stack[-1])
            raise
        finally:
            del self.module_stack[depth:]


def _switches_grad_on(op: Call) -> bool:
    """Whether an op that ran where grad is off makes autograd's graph; the casts that autocast caches always do."""
    return op.grad_enabled and op.target is not torch.ops.aten._to_copy.default and any(s.edge for s in op.inputs)


def _closed_over(function: Any) -> list[Any]:
    """Tensors that a callable brings along, which a checkpoint keeps with it: of a partial, or in a closure."""
    found: list[Any] = []
    while isinstance(function, functools.partial):
        found += [function.args, function.keywords]
        function = function.func
    for cell in getattr(function, "__closure__", None) or ():
        try:
            found.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    found.append(getattr(function, "__defaults__", None) or ())
    return [t for t in tensors_in(found) if not isinstance(t, nn.Parameter)]


class OpMode(TorchDispatchMode):
    """Shows a recorder every op below autograd; on fake tensors it also runs for real what can be known."""

    def __init__(self, recorder: Recorder, *, fake: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder
        self.fake = fake

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if op.namespace in UNSEEN:
            return op(*args, **kwargs)
        recorder = self.recorder
        if op in _FRESH:  # torch.tensor(...), from_numpy: made here, of neither weights nor data
            recorder.storage_of(args[0], Side.CONSTANT)
        call = recorder.begin("op", op, args, kwargs)
        given = call.inputs
        if op._schema.is_mutable:
            recorder.back_up(written(op, args, kwargs), everything=not self.fake)
        num_storages = len(recorder.storage_bytes)
        if self.fake:
            _check_dtypes(op, given)
        result = self._run_for_real(op, args, kwargs, given) if self.fake else NotImplemented
        if result is NotImplemented:
            result = op(*(self._known_masks_as_indices(op, args) if self.fake else args), **kwargs)
        for position, part in aliases(op, result):
            if position < len(args) and isinstance(args[position], Tensor):
                recorder.alias(part, recorder.storage_of(args[position], Side.DATA))
        side = result_side(op, (slot.side for slot in given))
        for tensor in written(op, args, kwargs):  # data written into a constant makes it data, for every view of it
            storage = recorder.storage_of(tensor, side)
            recorder.sides[storage] = max(recorder.sides[storage], side)
        recorder.end(call, result, side)
        # (Ops of a backward are not asked: on made-up values some of them crash.)
        in_forward = torch._C._current_autograd_node() is None
        laid_out = with_true_layout(call, result) if self.fake and in_forward else result
        if laid_out is not result:
            call.outputs.clear()
            result = laid_out
            recorder.end(call, result, side)
        recorder.own.update(range(num_storages, len(recorder.storage_bytes)))
        recorder.current.children.append(call)
        return result

    def _known_masks_as_indices(self, op: Any, args: Any) -> Any:
        """Boolean indices whose values are known, as the positions they stand for: the result then has a shape."""
        if op._schema.name not in _INDEXED or not isinstance(args[1], (list, tuple)):
            return args
        indices: list[Any] = []
        for index in args[1]:
            known = isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            if known and index.dim() and not isinstance(index, FakeTensor) and self.recorder.is_known(index):
                with unset_fake_temporarily():
                    indices.extend(index.nonzero().unbind(1))
            else:
                indices.append(index)
        return (args[0], indices, *args[2:])

    def _run_for_real(self, op: Any, args: Any, kwargs: Any, given: list[Slot]) -> Any:
        """Ops on values that are known (the batch's ids and masks, and what factories make) run for real.

        So a model that looks at its attention mask decides as it does in a real run, though its weights are fake.
        """
        recorder = self.recorder
        known = (
            torch.Tag.nondeterministic_seeded not in op.tags
            and op._schema.name not in _UNWRITTEN
            and (bool(given) or _is_small_factory(op, args, kwargs))
            and not any(isinstance(t, FakeTensor) for t in tensors_in((args, kwargs)))
            and not any(slot.storage in recorder.unknown or slot.meta.numel > _SMALL_NUMEL for slot in given)
        )
        changed = [recorder.storage_of(tensor, Side.DATA) for tensor in written(op, args, kwargs)]
        if changed and not (known and recorder.own.issuperset(changed)):
            recorder.unknown.update(changed)
            return NotImplemented
        if not known:
            return NotImplemented
        with unset_fake_temporarily():
            return op(*args, **kwargs)


_PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::mv", "aten::addmv", "aten::dot"}


def _check_dtypes(op: Any, given: list[Slot]) -> None:
    """Fake products take dtypes that the real ones refuse: a float64 input from NumPy, most often."""
    if op._schema.name in _PRODUCTS:
        a, b = given[-2].meta.dtype, given[-1].meta.dtype
        if a != b:
            raise RuntimeError(f"expected m1 and m2 to have the same dtype, but got: {a} != {b}")


_FRESH = {torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default}
_INDEXED = {"aten::index", "aten::index_put", "aten::index_put_"}
_UNWRITTEN = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::new_empty_strided"}
_SIZED_FACTORIES = {"aten::zeros", "aten::ones", "aten::full"}
_OTHER_FACTORIES = {"aten::arange", "aten::scalar_tensor", "aten::linspace", "aten::eye"}


def _is_small_factory(op: Any, args: Any, kwargs: Any) -> bool:
    device = kwargs.get("device")
    if device is not None and torch.device(device).type != "cpu":
        return False
    if op._schema.name in _OTHER_FACTORIES:
        return all(abs(a) <= _SMALL_NUMEL for a in args if isinstance(a, (int, float)))
    if op._schema.name not in _SIZED_FACTORIES or not args or not isinstance(args[0], (list, tuple)):
        return False
    numel = 1
    for size in args[0]:
        numel *= int(size)
    return numel <= _SMALL_NUMEL


class CallMode(TorchFunctionMode):
    """Shows a recorder what the user's code calls."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        recorder = self.recorder
        if func in (Tensor.backward, torch.autograd.backward) and recorder.current.kind != "function":
            raise TraceError("the step runs backward itself: let step= return the loss before .backward() is called")
        if func in _FLAG_CHANGES and recorder._in_region:
            recorder.entangled = "requires_grad is changed inside a checkpoint"
        if func in _MUTED_FUNCTIONS:
            tensor = args[0]
            result = func(*args, **kwargs)
            if func is Tensor.register_hook and tensor.requires_grad:
                recorder.note_hook(tensor, args[1] if len(args) > 1 else kwargs["hook"])
            if func in (Tensor.requires_grad_, _set_requires_grad) and tensor.requires_grad:
                edge = recorder.edge_of(tensor)
                if edge is not None:
                    recorder.always_edges.add(edge)
                    if recorder.value_of(tensor) in recorder.used:
                        recorder.entangled = "requires_grad_() is called on a tensor that was used before"
            return result
        if getattr(func, "__name__", "") in ("__get__", "__set__"):
            return func(*args, **kwargs)
        call = recorder.begin("torch", func, args, kwargs)
        transformed = torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
        call.replayable = not transformed and func is not torch.autograd.grad
        call.autocast = autocast_state()
        with recorder.inside(call):
            result = func(*args, **kwargs)
        if call.children or isinstance(result, Tensor):  # (contiguous() may have had nothing to do, this time)
            side = max((s.side for op in call.ops() for s in op.outputs), default=Side.DATA)
            recorder.end(call, result, side)
            # Torch resolves such arguments between autograd and the ops that are seen, so only the whole call will do.
            call.opaque = call.replayable and any(slot.meta.lazy for slot in call.inputs)
            recorder.current.children.append(call)
        return result


@contextmanager
def recording(recorder: Recorder, *, fake: bool) -> Iterator[Recorder]:
    """Record what runs inside on this thread. Enter any fake mode before."""
    with observed_by(recorder), OpMode(recorder, fake=fake), CallMode(recorder):
        yield recorder
