"""One backward pass recorded so that it can be run again: the models' calls, and what made a loss of their outputs.

The functions between a model and its loss are seen by a torch function mode that is there only outside of the models'
own calls, and only while a step is being recorded. What they were given from elsewhere (labels) is kept by reference.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext

from frostline.running.kept import graph

_WRITERS = ("__setitem__", "copy_")
_MOST_ENTRIES = 2000
_MOST_IDLE = 8  # calls of models of which no gradient came


@dataclass(frozen=True)
class _Made:
    """Stands for one tensor of an entry's result; ``position`` None for the result as a whole.

    ``graph``: whether it had one. What gets one later came out of an ``autograd.Function``, which is not seen.
    """

    entry: int
    position: int | None
    graph: bool = False


@dataclass(eq=False)
class Entry:
    """One call: a model's or a function's."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad: bool
    autocast: tuple[str, torch.dtype] | None
    is_model: bool
    writes: bool = False
    unexplained: bool = False  # it was given what comes of a model's parameters, but out of no call that was seen

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.grad))
            if self.autocast is not None:
                stack.enter_context(torch.autocast(self.autocast[0], dtype=self.autocast[1]))
            result = self.function(*args, **kwargs)
        return args[0] if self.writes else result


def leaves(value: Any) -> Iterator[Tensor]:
    """The tensors inside tuples, lists, mappings, dataclasses and distributions, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from leaves(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, (type, _Made)):
        for each in dataclasses.fields(value):
            yield from leaves(getattr(value, each.name, None))
    elif isinstance(value, torch.distributions.Distribution):
        yield from leaves(vars(value))


def variables(roots: tuple[Any, ...]) -> dict[int, Tensor]:
    """The leaves that a graph leads to, by id."""
    starts = [root.grad_fn if isinstance(root, Tensor) else root.node for root in roots]
    return {id(node.variable): node.variable for node in graph(starts) if hasattr(node, "variable")}


def is_transformed() -> bool:
    """Whether a transform of torch.func is at work: its tensors mean nothing outside of it."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class Tape(TorchFunctionMode):
    """Records calls from when it is put in place; `sealed` gives what one backward pass depends on.

    Args:
        parameters: those of the models, by id; more may come.
    """

    def __init__(self, parameters: Mapping[int, Any]) -> None:
        super().__init__()
        self._parameters = parameters
        self.armed = False
        self.entries: dict[int, Entry] = {}  # by number, in order
        self._next = 0
        self._made: dict[int, _Made] = {}  # by id of a tensor or of a whole result
        self._alive: list[Any] = []
        self._strange = False  # something of the entry being made is `unexplained`
        self._weak: dict[int, list[weakref.ref[Tensor]]] = {}  # of entries that need no gradient: their results

    # -- in place or not: below the user's own modes, so that theirs can be left in any order, but above the default
    # device, which torch looks for at the bottom ----------------------------------------------------------------------

    def put(self) -> None:
        if not self.armed:
            self._stack(own=[self])
            self.armed = True

    def take(self) -> None:
        """Take it away, now or, within a call that it sees, the next time."""
        self.armed = False
        self._stack(own=[])

    def _stack(self, *, own: list[Tape]) -> None:
        modes: list[Any] = []
        while torch._C._len_torch_function_stack():
            modes.insert(0, torch._C._pop_torch_function_stack())
        bottom = [mode for mode in modes if isinstance(mode, DeviceContext)]
        rest = [mode for mode in modes if mode is not self and mode not in bottom]
        for mode in [*bottom, *own, *rest]:
            torch._C._push_on_torch_function_stack(mode)

    # -- recording -----------------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.armed or is_transformed():
            return func(*args, **kwargs)
        grad, autocast = torch.is_grad_enabled(), _autocast(args, kwargs)
        result = func(*args, **kwargs)
        try:
            self._note(func, tuple(args), kwargs, result, grad, autocast)
        except Exception:  # (a backward that depends on it cannot be sealed; the script goes on)
            self.drop()
        return result

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: Any, result: Any, grad: bool, autocast: Any) -> None:
        writes = result is None and getattr(func, "__name__", "") in _WRITERS
        outputs = list(leaves(args[0] if writes else result))
        known = any(id(tensor) in self._made for tensor in leaves((args, kwargs)))
        if outputs and (known or any(tensor.requires_grad for tensor in outputs)):
            entry = Entry(func, self._referred(args), self._referred(kwargs), grad, autocast, False, writes)
            self._add(entry, args[0] if writes else result)

    def module_called(
        self, module: nn.Module, args: Any, kwargs: Any, result: Any, autocast: Any, *, is_model: bool
    ) -> None:
        """Note a call of a module from outside of any; a loss is one that is no model."""
        grad = torch.is_grad_enabled()
        entry = Entry(module, self._referred(args), self._referred(kwargs), grad, autocast, is_model)
        self._add(entry, result)

    def _add(self, entry: Entry, result: Any) -> None:
        entry.unexplained, self._strange = self._strange, False
        idle = sum(self.entries[number].is_model for number in self._weak)
        if len(self.entries) >= _MOST_ENTRIES or (entry.is_model and idle >= _MOST_IDLE):
            self.drop()
        number = self._next
        self._next += 1
        self.entries[number] = entry
        tensors = list(leaves(result))
        for position, tensor in enumerate(tensors):
            self._made[id(tensor)] = _Made(number, position, tensor.grad_fn is not None)
        if not any(tensor.requires_grad for tensor in tensors):  # an evaluation, most often: batches must not pile up
            self._weak[number] = [weakref.ref(t, functools.partial(_forget, self._made, id(t))) for t in tensors]
            self._prune()
            return
        self._alive += [result, *tensors]
        if not isinstance(result, Tensor):
            self._made[id(result)] = _Made(number, None)

    def _prune(self) -> None:
        """Drop the calls that need no gradient and whose results nobody can use any more."""
        used = {ref.entry for entry in self.entries.values() for ref in _references((entry.args, entry.kwargs))}
        for number, results in list(self._weak.items()):
            if number not in used and all(each() is None for each in results):
                del self.entries[number], self._weak[number]

    def _referred(self, value: Any) -> Any:
        """``value`` with references in place of what entries before made."""
        found = self._made.get(id(value))
        if found is not None:
            self._strange |= isinstance(value, Tensor) and value.grad_fn is not None and not found.graph
            return found
        if isinstance(value, Tensor) and value.grad_fn is not None:
            self._strange |= not self._parameters.keys().isdisjoint(variables((value,)))
            return value.detach().requires_grad_()
        return value if isinstance(value, Tensor) else _rebuilt(value, self._referred)

    def given(self) -> set[int]:
        """Ids of the tensors that the calls were given from elsewhere."""
        return {id(tensor) for entry in self.entries.values() for tensor in leaves((entry.args, entry.kwargs))}

    def drop(self) -> None:
        """Let go of everything."""
        self.entries, self._made, self._alive, self._weak = {}, {}, [], {}

    def sealed(self, roots: tuple[Any, ...]) -> list[Entry] | None:
        """The entries that ``roots`` depend on, and what stands for these at the end; None if not all was seen."""
        refs = [self._made.get(id(root)) for root in roots]
        if any(ref is None or not ref.graph for ref in refs):
            return None
        needed: set[int] = {ref.entry for ref in refs if ref is not None}
        for number in sorted(self.entries, reverse=True):
            if number in needed:
                entry = self.entries[number]
                needed.update(ref.entry for ref in _references((entry.args, entry.kwargs)))
        if any(self.entries[number].unexplained for number in needed):
            return None
        order = sorted(needed)
        renumbered = {number: at for at, number in enumerate(order)}

        def moved(value: Any) -> Any:
            if isinstance(value, _Made):
                return _Made(renumbered[value.entry], value.position)
            return value if isinstance(value, Tensor) else _rebuilt(value, moved)

        kept = [
            dataclasses.replace(self.entries[n], args=moved(self.entries[n].args), kwargs=moved(self.entries[n].kwargs))
            for n in order
        ]
        self._roots = tuple(moved(ref) for ref in refs)
        return kept


def _forget(made: dict[int, _Made], number: int, _: object) -> None:
    made.pop(number, None)


def _rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    """Tuples, lists and plain dicts with their items changed; other things as they are."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(change(item) for item in value))
    if type(value) in (tuple, list):
        return type(value)(change(item) for item in value)
    if isinstance(value, Mapping):
        changed = {key: change(item) for key, item in value.items()}
        if type(value) is dict:
            return changed
        return value if all(changed[key] is value[key] for key in changed) else changed
    return value


def _references(value: Any) -> Iterator[_Made]:
    if isinstance(value, _Made):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _references(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _references(item)


def _autocast(args: Any, kwargs: Any) -> tuple[str, torch.dtype] | None:
    """The autocast that a call runs under."""
    tensor = next(leaves((args, kwargs)), None)
    return autocast_on("cpu" if tensor is None else tensor.device.type)


def autocast_on(device: str) -> tuple[str, torch.dtype] | None:
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return (device, torch.get_autocast_dtype(device)) if on else None


@dataclass(eq=False)
class Replay:
    """One backward pass, to be run again.

    Attributes:
        entries: the calls, in order.
        roots: what backward began from, and ``gradients`` what it was given for these (None: ones).
        models: the models in it.
        trainable: ids of the parameters that required grad.
    """

    entries: list[Entry]
    roots: tuple[_Made, ...]
    gradients: tuple[Tensor | None, ...]
    models: tuple[nn.Module, ...]
    trainable: frozenset[int]
    modules: list[tuple[nn.Module, dict[str, Any]]]

    @property
    def is_simple(self) -> bool:
        """Whether it is one call of the model itself, and then functions."""
        first = self.entries[0]
        plain = first.is_model and first.function is self.models[0] and first.grad and first.autocast is None
        return plain and len(self.models) == 1 and not any(entry.is_model for entry in self.entries[1:])

    def run(self) -> Tensor:
        """Run all of it, up to the scalar that backward would begin from."""
        return _finished({}, self.entries, self.roots, self.gradients)

    @property
    def loss(self) -> Callable[[Any], Tensor]:
        """What follows the model's call, if it `is_simple`: outputs -> scalar, with the tensors that it was given."""
        return functools.partial(_loss_of, tuple(self.entries[1:]), self.roots, self.gradients)

    def restore(self) -> None:
        """Put the modules, and which parameters require grad, back to what they were when this was recorded."""
        for module, attributes in self.modules:
            module.__dict__.clear()
            module.__dict__.update({key: _copied(value) for key, value in attributes.items()})
        for model in self.models:
            for parameter in model.parameters():
                parameter.requires_grad_(id(parameter) in self.trainable)

    @contextmanager
    def as_recorded(self) -> Iterator[None]:
        """The modules as they were when this was recorded: modes, hooks, what is inside what."""
        now = [(module, dict(module.__dict__)) for module, _ in self.modules]
        try:
            for module, attributes in self.modules:
                module.__dict__.clear()
                module.__dict__.update({key: _copied(value) for key, value in attributes.items()})
            yield
        finally:
            for module, attributes in now:
                module.__dict__.clear()
                module.__dict__.update(attributes)


def _loss_of(
    entries: tuple[Entry, ...], roots: tuple[_Made, ...], gradients: tuple[Tensor | None, ...], outputs: Any
) -> Tensor:
    return _finished({0: outputs}, entries, roots, gradients)


def _finished(
    made: dict[int, Any], entries: Sequence[Entry], roots: tuple[_Made, ...], gradients: tuple[Tensor | None, ...]
) -> Tensor:
    """Run entries after what was made before them, and take the scalar that backward would begin from."""

    def given(value: Any) -> Any:
        if isinstance(value, _Made):
            whole = made[value.entry]
            return whole if value.position is None else list(leaves(whole))[value.position]
        return value if isinstance(value, Tensor) else _rebuilt(value, given)

    for number, entry in enumerate(entries, start=len(made)):
        made[number] = entry.run(given(entry.args), given(entry.kwargs))
    parts = []
    for root, gradient in zip(roots, gradients, strict=True):
        tensor = given(root)
        weighted = tensor if gradient is None else tensor * gradient.detach().to(tensor.dtype)
        parts.append(weighted if weighted.dim() == 0 else weighted.sum())
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def _copied(value: Any) -> Any:
    return value.copy() if isinstance(value, (dict, list, set)) else value


def snapshot(models: tuple[nn.Module, ...]) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Every module of these, and its attributes, containers copied one level down."""
    found = {id(module): module for model in models for module in model.modules()}
    return [
        (module, {key: _copied(value) for key, value in module.__dict__.items()})
        for module in found.values()
        if not isinstance(module, torch.jit.ScriptModule)
    ]


class Together(nn.Module):
    """Several models as one, each under what the code calls it."""

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, model in models.items():
            self.add_module(name, model)
