"""Slices of a tensor: reading and spelling them, and the arithmetic of what they hold."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from frostline.errors import SubsetError

MAX_PIECES = 512  # slices of one tensor: past this, "all but every 1000th row" would be a list nobody can read


@dataclass(frozen=True)
class TensorSlice:
    """A part of a tensor that a Python index spells, normalised against the tensor's shape.

    Every dimension is kept (the row ``[3]`` of a matrix has one row here), so that the part has as many dimensions
    as the tensor. Steps are positive and no part is empty.

    Attributes:
        tensor_shape: the shape of the whole tensor.
        dims: the indexes taken from each dimension, one ``range`` a dimension.

    >>> import torch
    >>> part = TensorSlice.parse("[-2:, ::3]", (10, 8))
    >>> str(part), part.shape, part.numel
    ('[8:, ::3]', (2, 3), 6)
    >>> torch.ones(10, 8)[part.index].shape
    torch.Size([2, 3])
    """

    tensor_shape: tuple[int, ...]
    dims: tuple[range, ...]

    def __post_init__(self) -> None:
        fits = len(self.dims) == len(self.tensor_shape) and all(
            (len(dim) and dim[0] >= 0 and dim[-1] < size and dim.step > 0) or size == 0
            for dim, size in zip(self.dims, self.tensor_shape, strict=False)
        )
        if not fits:
            raise SubsetError(f"{list(self.dims)} is no part of a tensor of shape {spell_shape(self.tensor_shape)}.")

    @classmethod
    def whole(cls, shape: Iterable[int]) -> TensorSlice:
        """Return the slice that holds the whole tensor."""
        sizes = tuple(int(size) for size in shape)
        return cls(sizes, tuple(range(size) for size in sizes))

    @classmethod
    def parse(cls, text: str, shape: Iterable[int], name: str = "the tensor") -> TensorSlice:
        """Read a slice as Python writes it, such as ``"[:, :128]"``: integers, ``start:stop:step`` and ``...``.

        Bounds past the end are clipped, as Python does.

        Args:
            text: the index, with or without its brackets.
            shape: the shape of the tensor it cuts.
            name: the tensor's name, for errors.

        Raises:
            SubsetError: the index cannot be read, has too many dimensions, is out of range, or holds nothing.
        """
        sizes = tuple(int(size) for size in shape)
        inner = text.strip().removeprefix("[").removesuffix("]")
        where = f"{name}[{inner}], where {name} has shape {spell_shape(sizes)}"
        parts = [part.strip() for part in inner.split(",")]
        if parts and parts[-1] == "" and len(parts) > 1:  # Python's trailing comma, "[3,]"
            parts.pop()
        if parts.count("...") > 1:
            raise SubsetError(f"{where}: an index can hold one '...' only.")
        given = len(parts) - parts.count("...")
        if given > len(sizes):
            raise SubsetError(f"{where}: {given} given for {len(sizes)} dimensions. Write at most {len(sizes)}.")
        fill = [":"] * (len(sizes) - given)
        at = parts.index("...") if "..." in parts else len(parts)
        parts = parts[:at] + fill + parts[at + 1 :]
        dims = tuple(
            _parse_dim(part, size, where, dim) for dim, (part, size) in enumerate(zip(parts, sizes, strict=True))
        )
        return cls(sizes, dims)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the part, with every dimension kept."""
        return tuple(len(dim) for dim in self.dims)

    @property
    def numel(self) -> int:
        """How many elements the part holds."""
        return math.prod(self.shape)

    @property
    def index(self) -> tuple[slice, ...]:
        """What to write in the brackets: ``tensor[part.index]`` is a view of the part."""
        return tuple(slice(dim.start, dim.stop, dim.step) for dim in self.dims)

    @property
    def is_whole(self) -> bool:
        """Whether the part is the whole tensor."""
        return self.shape == self.tensor_shape

    def minus(self, other: TensorSlice) -> tuple[TensorSlice, ...]:
        """Return what is in this part and not in ``other``, as parts that do not overlap."""
        assert self.tensor_shape == other.tensor_shape
        common = [_common(mine, theirs) for mine, theirs in zip(self.dims, other.dims, strict=True)]
        if not all(len(dim) for dim in common):
            return (self,)
        pieces: list[TensorSlice] = []
        for dim, shared in enumerate(common):
            for rest in _without(self.dims[dim], shared):
                dims = (*common[:dim], rest, *self.dims[dim + 1 :])
                pieces.append(TensorSlice(self.tensor_shape, dims))
        return tuple(pieces)

    def __str__(self) -> str:
        spelled = [_spell_dim(dim, size) for dim, size in zip(self.dims, self.tensor_shape, strict=True)]
        while len(spelled) > 1 and spelled[-1] == ":":
            spelled.pop()
        return f"[{', '.join(spelled) or '...'}]"


def _parse_dim(text: str, size: int, where: str, dim: int) -> range:
    """Read one dimension's index: an integer or ``start:stop:step``."""
    fields = [part.strip() for part in text.split(":")]
    if len(fields) > 3 or not all(re.fullmatch(r"[+-]?\d+|", part) for part in fields) or text == "":
        raise SubsetError(
            f"{where}: cannot read {text!r}. Write integers, start:stop:step or '...' between the commas."
        )
    if len(fields) == 1:
        at = int(fields[0])
        if not -size <= at < size:
            raise SubsetError(f"{where}: index {at} is out of range for dimension {dim}, which has size {size}.")
        return range(at % size, at % size + 1)
    start, stop, step = (int(part) if part else None for part in (*fields, "")[:3])
    if step is not None and step <= 0:
        raise SubsetError(f"{where}: step {step} in dimension {dim}. A step must be 1 or more, as torch has it.")
    taken = range(*slice(start, stop, step).indices(size))
    if not len(taken):
        raise SubsetError(f"{where}: {text!r} holds nothing in dimension {dim}, which has size {size}.")
    return _tidy(taken)


def _spell_dim(dim: range, size: int) -> str:
    """Spell one dimension as Python does, leaving out what goes without saying."""
    start = "" if dim.start == 0 else str(dim.start)
    stop = "" if dim[-1] + dim.step >= size else str(dim.stop)
    return f"{start}:{stop}" + (f":{dim.step}" if dim.step != 1 else "")


def _tidy(dim: range) -> range:
    """Return the same indexes with the smallest stop, and step 1 where there is one index only."""
    return range(dim[0], dim[-1] + 1, dim.step if len(dim) > 1 else 1)


def _common(a: range, b: range) -> range:
    """Return the indexes in both: two arithmetic progressions meet in a third (Chinese remainders)."""
    gcd = math.gcd(a.step, b.step)
    if (b.start - a.start) % gcd:
        return range(0)
    modulus = b.step // gcd
    meet = a.start + a.step * ((b.start - a.start) // gcd * pow(a.step // gcd, -1, modulus) % modulus)
    period = a.step * modulus
    low = max(a.start, b.start)
    shared = range(low + (meet - low) % period, min(a.stop, b.stop), period)
    return _tidy(shared) if len(shared) else range(0)


def _without(a: range, shared: range) -> list[range]:
    """Return the indexes of ``a`` that are not in ``shared``, a progression of indexes of ``a``."""
    first, last = a.index(shared[0]), a.index(shared[-1])
    stride = shared.step // a.step if len(shared) > 1 else 1
    between = [a[first + offset : last : stride] for offset in range(1, stride)]
    return [_tidy(rest) for rest in (a[:first], *between, a[last + 1 :]) if len(rest)]


def merged(parts: list[TensorSlice]) -> tuple[TensorSlice, ...]:
    """Join neighbours: ``[:2]`` and ``[2:4]`` read better as ``[:4]``."""
    parts = sorted(parts, key=lambda part: tuple((dim.start, dim.stop, dim.step) for dim in part.dims))
    joined = True
    while joined:
        joined = False
        for i, left in enumerate(parts):
            for j, right in enumerate(parts):
                differ = [dim for dim, (a, b) in enumerate(zip(left.dims, right.dims, strict=True)) if a != b]
                if i == j or len(differ) != 1:
                    continue
                a, b = left.dims[differ[0]], right.dims[differ[0]]
                if a.step == b.step and a[-1] + a.step == b[0]:
                    dims = list(left.dims)
                    dims[differ[0]] = range(a.start, b.stop, a.step)
                    parts[i] = TensorSlice(left.tensor_shape, tuple(dims))
                    del parts[j]
                    joined = True
                    break
            if joined:
                break
    return tuple(parts)


def union(before: tuple[TensorSlice, ...], parts: tuple[TensorSlice, ...]) -> tuple[TensorSlice, ...]:
    """Join parts that may overlap into parts that do not."""
    pieces = list(before)
    for part in parts:
        fresh = [part]
        for old in pieces:
            fresh = [piece for new in fresh for piece in new.minus(old)]
        pieces += fresh
    return merged(few(pieces, "one tensor"))


def whole_or(parts: tuple[TensorSlice, ...], name: str) -> tuple[TensorSlice, ...] | None:
    """Return None, the whole tensor, if parts that do not overlap cover all of it."""
    if sum(part.numel for part in parts) == math.prod(parts[0].tensor_shape):
        return None
    return tuple(few(list(parts), name))


def few(parts: Any, name: str) -> Any:
    """Refuse more slices of one tensor than anyone can read."""
    if len(parts) > MAX_PIECES:
        raise SubsetError(f"{name} falls into {len(parts)} slices, more than {MAX_PIECES}. Write larger slices.")
    return parts


def spell_shape(shape: Iterable[int]) -> str:
    """Print a shape as torch does."""
    return f"[{', '.join(str(size) for size in shape)}]"
