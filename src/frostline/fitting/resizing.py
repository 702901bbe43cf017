"""The same step at another batch and length: its inputs, made without memory where a trace needs no values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from frostline.errors import FitError
from frostline.fitting.axes import Axis, batch_axis, length_axis, named_tensors
from frostline.fitting.losses import tensors_of, with_tensors
from frostline.tracing.step import map_tensors
from frostline.tracing.trace import Trace, trace

MOST_REAL_BYTES = 1 << 30
"""Of inputs that have to hold values: what a trace at another size may take of this machine."""


class Values(IntEnum):
    """Which inputs of another size hold values: the fewest that lead to the same trace."""

    NONE = 0
    INTEGERS = 1
    ALL = 2


@dataclass
class Resizer:
    """Traces one step at other sizes.

    Attributes:
        base: the trace at the sizes given.
        loss: as given to ``fl.trace``.
        inputs, of_loss: the step's tensors by name.
        batch, length: what can be resized.
    """

    base: Trace
    loss: Any
    inputs: Mapping[str, Tensor]
    of_loss: Mapping[str, Tensor]
    batch: Axis
    length: Axis | None
    values: Values = Values.NONE

    @classmethod
    def of(cls, base: Trace, loss: Any, batch: Any, sequence: Any) -> Resizer:
        """Find the axes of a traced step; see `frostline.fitting.axes`."""
        rehearsal = base.rehearsal
        inputs = named_tensors(base.model, rehearsal.args, rehearsal.kwargs)
        of_loss = {f"loss.{name}": tensor for name, tensor in tensors_of(loss)}
        found = batch_axis(inputs, of_loss, batch)
        length = None
        if sequence is not False:
            length, found = length_axis(inputs, of_loss, found, sequence)
        return cls(base, loss, inputs, of_loss, found, length)

    def trace(self, batch: int, length: int | None = None) -> Trace:
        """The step at another batch and length.

        Raises:
            Exception: what the step raises at this size.
        """
        resized = self._resized(batch, length)

        def other(tensor: Tensor) -> Tensor:
            return resized.get(id(tensor), tensor)

        rehearsal = self.base.rehearsal
        return trace(
            self.base.model,
            loss=with_tensors(self.loss, other),
            device=self.base.device,
            args=map_tensors(rehearsal.args, other),
            kwargs=map_tensors(rehearsal.kwargs, other),
        )

    def _resized(self, batch: int, length: int | None) -> dict[int, Tensor]:
        """The tensors of another size, by the ``id`` of those given."""
        valued = self._valued()
        return {
            key: tiled(tensor, shape, real=key in valued)
            for key, (tensor, shape) in self._shapes(batch, length).items()
        }

    def _shapes(self, batch: int, length: int | None) -> dict[int, tuple[Tensor, tuple[int, ...]]]:
        found: dict[int, tuple[Tensor, tuple[int, ...]]] = {}
        for name, tensor in {**self.inputs, **self.of_loss}.items():
            shape = self.batch.resized(name, tuple(tensor.shape), batch)
            if self.length is not None and length is not None:
                shape = self.length.resized(name, shape, length)
            found.setdefault(id(tensor), (tensor, shape))
        return found

    def _valued(self) -> set[int]:
        """The inputs that hold values, by ``id``."""
        valued = {id(t) for t in self.of_loss.values()}  # beside fake tensors torch refuses those on meta
        return valued | {id(t) for t in self.inputs.values() if _holds_values(t, self.values)}

    def real_bytes(self, batch: int, length: int | None = None) -> int:
        """Of this machine's memory, what the inputs of a size take."""
        valued = self._valued()
        shapes = self._shapes(batch, length).items()
        return sum(torch.Size(shape).numel() * t.element_size() for key, (t, shape) in shapes if key in valued)

    def most(self, kind: str) -> int | None:
        """The largest batch or length whose inputs this machine may hold, the other as given; None: any."""
        batch, length = self.batch.size, None if self.length is None else self.length.size

        def taken(size: int) -> int:
            return self.real_bytes(size, length) if kind == "batch" else self.real_bytes(batch, size)

        if taken(2) == taken(1):
            return None
        low, high = 1, 2
        while taken(high) <= MOST_REAL_BYTES:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if taken(middle) <= MOST_REAL_BYTES else (low, middle)
        return low


def _holds_values(tensor: Tensor, values: Values) -> bool:
    if tensor.device.type == "meta":
        return False
    floating = tensor.is_floating_point() or tensor.is_complex()
    return values is Values.ALL or (values is Values.INTEGERS and not floating)


def tiled(tensor: Tensor, shape: tuple[int, ...], *, real: bool) -> Tensor:
    """A tensor of another shape: its values over and over, or (not ``real``) none, on ``meta``.

    The order of its dimensions in memory stays; dtype and ``requires_grad`` too.

    >>> tiled(torch.tensor([1, 2]), (5,), real=True)
    tensor([1, 2, 1, 2, 1])
    """
    if tensor.layout is not torch.strided:
        if tuple(tensor.shape) == shape:
            return tensor
        raise FitError(f"inputs of layout {tensor.layout} cannot be resized")
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
    device = tensor.device if real else torch.device("meta")
    found = torch.empty_permuted(shape, order, dtype=tensor.dtype, device=device)
    if real:
        source = tensor.detach()
        for dim, size in enumerate(shape):
            if size != source.shape[dim]:
                rows = torch.arange(size, device=source.device) % source.shape[dim]
                source = source.index_select(dim, rows)
        found.copy_(source)
    return found.requires_grad_(tensor.requires_grad)
