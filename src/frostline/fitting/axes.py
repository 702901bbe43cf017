"""Which dimensions of which tensors are the batch, and which the sequence length."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from frostline.errors import FitError
from frostline.tracing.step import map_tensors

Dims = int | Sequence[int]
Asked = int | Mapping[str, Dims] | None


@dataclass(frozen=True)
class Axis:
    """A size of the step that can be another.

    Attributes:
        kind: ``"batch"`` or ``"length"``.
        size: as given.
        places: tensor -> its dimensions of this size (or of a multiple of it).
        given: said by the caller, as against found.
    """

    kind: str
    size: int
    places: Mapping[str, tuple[int, ...]]
    given: bool = False

    def resized(self, name: str, shape: tuple[int, ...], size: int) -> tuple[int, ...]:
        """A tensor's shape when this axis is of another size."""
        sizes = list(shape)
        for dim in self.places.get(name, ()):
            sizes[dim] = sizes[dim] // self.size * size
        return tuple(sizes)

    def without(self, names: Sequence[str]) -> Axis:
        return replace(self, places={name: dims for name, dims in self.places.items() if name not in names})

    def __str__(self) -> str:
        by_dims: dict[tuple[int, ...], list[str]] = {}
        for name, dims in self.places.items():
            by_dims.setdefault(dims, []).append(name)
        parts = [f"dimension {' and '.join(map(str, dims))} of {_listed(names)}" for dims, names in by_dims.items()]
        return f"{'; '.join(parts)} ({self.size} as {'given' if self.given else 'found'})"


def named_tensors(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The step's input tensors by name: as ``forward`` calls its arguments, or by position where it has no name."""
    try:
        names = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind is not p.VAR_POSITIONAL]
    except (TypeError, ValueError):
        names = []
    found: dict[str, Tensor] = {}
    for position, value in enumerate(args):
        found.update(_inside(names[position] if position < len(names) else str(position), value))
    for name, value in kwargs.items():
        found.update(_inside(name, value))
    return found


def _inside(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _inside(f"{name}.{key}", item)
    elif isinstance(value, (tuple, list)):
        for number, item in enumerate(value):
            yield from _inside(f"{name}.{number}", item)
    elif value is not None:
        seen: list[Tensor] = []
        map_tensors(value, lambda tensor: seen.append(tensor) or tensor)  # type: ignore[func-returns-value]
        for number, tensor in enumerate(seen):
            yield f"{name}.{number}", tensor


def batch_axis(inputs: Mapping[str, Tensor], of_loss: Mapping[str, Tensor], asked: Asked) -> Axis:
    """The batch: as asked, or dimension 0 of every tensor that has as many rows as the first.

    Args:
        inputs, of_loss: the step's tensors; those the loss brings with it follow wherever their dimension 0 does.
        asked: name -> dimension(s), or one dimension of every input that has it in the first one's size.

    Raises:
        FitError: no input has a dimension, or what was asked for is not there.
    """
    if isinstance(asked, Mapping):
        axis = _as_asked("batch", {**inputs, **of_loss}, asked)
    else:
        dim = asked or 0
        first = next((t for t in inputs.values() if t.dim() > dim), None)
        if first is None:
            raise FitError(
                f"no batch dimension was found: no input has a dimension {dim}"
                + (f" ({_shapes(inputs)})" if inputs else ", for there is no input tensor")
                + ". Say which: batch={'NAME': 0}, on the command line --batch-dim NAME=0"
            )
        size = first.shape[dim]
        if not size:
            raise FitError(f"dimension {dim} of the first input is empty: give at least one sample")
        places = {name: (dim,) for name, t in inputs.items() if t.dim() > dim and t.shape[dim] == size}
        axis = Axis("batch", size, places, given=asked is not None)
    if any(name in axis.places for name in of_loss):
        return axis
    rows = {name: (0,) for name, t in of_loss.items() if t.dim() and t.shape[0] == axis.size}
    return replace(axis, places={**axis.places, **rows})


def length_axis(
    inputs: Mapping[str, Tensor], of_loss: Mapping[str, Tensor], batch: Axis, asked: Asked
) -> tuple[Axis | None, Axis]:
    """The sequence length: as asked, or dimension 1 of the first input of integers and of all that share its sizes.

    Returns it (None: there is none) and the batch, with labels of batch x length added to both.
    """
    if isinstance(asked, Mapping):
        axis = _as_asked("length", {**inputs, **of_loss}, asked)
    else:
        dim = 1 if asked is None else asked
        first = next((t for name, t in inputs.items() if _has_length(name, t, batch, dim)), None)
        if first is None and asked is not None:
            first = next((t for t in inputs.values() if t.dim() > dim), None)
        if first is None:
            return None, batch
        size = first.shape[dim]
        places = {
            name: (dim,)
            for name, t in {**inputs, **of_loss}.items()
            if t.dim() > dim and t.shape[dim] == size and dim not in batch.places.get(name, ())
            and (name in batch.places or asked is not None)
        }  # fmt: skip
        axis = Axis("length", size, places, given=asked is not None)
    flat = {
        name: (0,)
        for name, t in of_loss.items()
        if t.dim() == 1
        and t.shape[0] == batch.size * axis.size
        and name not in axis.places
        and name not in batch.places
    }
    axis = replace(axis, places={**axis.places, **flat})
    return axis, replace(batch, places={**batch.places, **flat})


def _has_length(name: str, tensor: Tensor, batch: Axis, dim: int) -> bool:
    integers = not tensor.is_floating_point() and not tensor.is_complex()
    return integers and tensor.dim() == 2 and batch.places.get(name) == (0,) and dim == 1 and tensor.shape[1] > 1


def _as_asked(kind: str, tensors: Mapping[str, Tensor], asked: Mapping[str, Dims]) -> Axis:
    places: dict[str, tuple[int, ...]] = {}
    sizes: dict[int, str] = {}
    by_position = list(tensors)
    for name, dims in asked.items():
        spelled = by_position[int(name)] if name.isdigit() and int(name) < len(by_position) else name
        if spelled not in tensors:
            raise FitError(f"{kind} dimension: there is no tensor {name!r}; there is {_shapes(tensors)}")
        shape = tuple(tensors[spelled].shape)
        places[spelled] = (dims,) if isinstance(dims, int) else tuple(dims)
        for dim in places[spelled]:
            if not 0 <= dim < len(shape):
                raise FitError(f"{kind} dimension: {name} has no dimension {dim}, its shape is {shape}")
            sizes[shape[dim]] = spelled
    if not sizes:
        raise FitError(f"no {kind} dimension was given")
    if len(sizes) > 1:
        told = ", ".join(f"{size} in {name}" for size, name in sizes.items())
        raise FitError(f"the {kind} dimensions given differ in size: {told}")
    (size,) = sizes
    return Axis(kind, size, places, given=True)


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name}{list(t.shape)}" for name, t in tensors.items())


def _listed(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
