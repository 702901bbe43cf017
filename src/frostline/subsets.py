"""Which parameters train: patterns, slices, modules, optimizers and predicates become a :class:`Subset`.

>>> from torch import nn
>>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
>>> resolve("2", model).names
('2.weight', '2.bias')
>>> resolve("@all, !*.bias", model).names
('0.weight', '2.weight')
>>> subset = resolve("0.weight[:, 8:]", model)
>>> subset.spelled(), subset.num_parameters()
(('0.weight[:, 8:]',), 256)
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from .errors import SubsetError

__all__ = ["BUILT_INS", "Match", "Subset", "TensorSlice", "blocks", "num_blocks", "resolve"]

BUILT_INS: Mapping[str, str] = {
    "@now": "the parameters whose requires_grad is set now",
    "@all": "every floating-point or complex parameter",
    "@head": "the last module, the one that turns features into outputs",
    "@biases": "parameters of at most one dimension whose own name has the word 'bias'",
    "@norms": "the parameters that normalisation modules own",
    "@last:K": "the last K blocks and everything registered after them",
}
"""The built-in subsets, and what each of them means."""

MAX_PIECES = 512  # slices of one tensor: past this, "all but every 1000th row" would be a list nobody can read


# --------------------------------------------------------------------------------------------------------- slices


@dataclass(frozen=True)
class TensorSlice:
    """A part of a tensor that a Python index spells, normalised against the tensor's shape.

    Every dimension is kept (the row ``[3]`` of a matrix has one row here), so that the part has as many dimensions
    as the tensor. Steps are positive and no part is empty.

    Attributes:
        tensor_shape: the shape of the whole tensor.
        dims: the indexes taken from each dimension, one ``range`` a dimension.

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
            raise SubsetError(f"{list(self.dims)} is no part of a tensor of shape {_shape(self.tensor_shape)}.")

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
        where = f"{name}[{inner}], where {name} has shape {_shape(sizes)}"
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


def _merged(parts: list[TensorSlice]) -> tuple[TensorSlice, ...]:
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


def _shape(shape: Iterable[int]) -> str:
    """Print a shape as torch does."""
    return f"[{', '.join(str(size) for size in shape)}]"


# --------------------------------------------------------------------------------------------------------- values


@dataclass(frozen=True)
class Match:
    """What one pattern matched.

    Attributes:
        pattern: the pattern as written, with its ``!`` if it takes away; or what was passed in its place.
        names: the canonical names it matched, parts spelled with their slice.
        note: what a reader should know, such as ties that were followed; may be empty.
    """

    pattern: str
    names: tuple[str, ...]
    note: str = ""

    def summary(self, limit: int = 6) -> str:
        """Say it in one line, ``"@head matched classifier.weight, classifier.bias"``, with at most ``limit`` names."""
        shown = ", ".join(self.names[:limit]) or "nothing"
        if len(self.names) > limit:
            shown += f" and {len(self.names) - limit} more"
        verb = "took away" if self.pattern.startswith("!") else "matched"
        return f"{self.pattern} {verb} {shown}" + (f" ({self.note})" if self.note else "")

    def __str__(self) -> str:
        return self.summary()


@dataclass(frozen=True)
class Subset:
    """The parameters, or slices of them, that train. Two are equal when their names and slices are.

    Attributes:
        names: canonical parameter names, whole or in part, in the order of ``model.named_parameters()``.
        slices: for each parameter trained in part, the parts: they never overlap.
        label: how the caller wrote it, for reports: ``"@last:2"``, ``"layer2,*.bias"``, ``"Adam optimizer"``.
        matched: what each pattern matched, in the order written.
        shapes: the shape of every parameter in ``names``.
    """

    names: tuple[str, ...]
    slices: Mapping[str, tuple[TensorSlice, ...]] = field(default_factory=dict)
    label: str = field(default="", compare=False)
    matched: tuple[Match, ...] = field(default=(), compare=False)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict, compare=False)

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._name_set

    def __hash__(self) -> int:
        return hash((self.names, tuple(sorted((name, str(parts)) for name, parts in self.slices.items()))))

    def __str__(self) -> str:
        return self.label or ", ".join(self.spelled())

    @cached_property
    def _name_set(self) -> frozenset[str]:
        return frozenset(self.names)

    def is_whole(self, name: str) -> bool:
        """Whether all of parameter ``name`` trains."""
        return name in self and name not in self.slices

    def num_elements(self, name: str) -> int:
        """Count the elements of parameter ``name`` that train: 0 if it is not in the subset."""
        if name not in self:
            return 0
        if name in self.slices:
            return sum(part.numel for part in self.slices[name])
        if name not in self.shapes:
            raise SubsetError(
                f"the shape of {name!r} is not known to this Subset. Pass it through resolve(subset, model)."
            )
        return math.prod(self.shapes[name])

    def num_parameters(self) -> int:
        """Count the elements that train, as "number of parameters" is commonly meant; ``len`` counts tensors."""
        return sum(self.num_elements(name) for name in self.names)

    def spelled(self) -> tuple[str, ...]:
        """Spell every parameter and slice as ``train=`` reads it: a list of these resolves to this subset again."""
        spelled: list[str] = []
        for name in self.names:
            spelled.extend(f"{name}{part}" for part in self.slices.get(name, ("",)))
        return tuple(spelled)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "label": self.label,
            "names": list(self.names),
            "slices": {name: [str(part) for part in parts] for name, parts in self.slices.items()},
            "num_tensors": len(self),
            "num_parameters": self.num_parameters(),
            "matched": [{"pattern": m.pattern, "names": list(m.names), "note": m.note} for m in self.matched],
        }


# ---------------------------------------------------------------------------------------------------------- model


class _Names:
    """A model's parameters and modules under every name they have, ties and shared modules included."""

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise SubsetError(f"the model is a {type(model).__name__}, not a torch.nn.Module.")
        self.model = model
        self.params: dict[str, nn.Parameter] = dict(model.named_parameters())
        lazy = [name for name, param in self.params.items() if is_lazy(param)]
        if lazy:
            raise SubsetError(
                f"{lazy[0]!r} has no shape yet ({len(lazy)} lazy parameters in {type(model).__name__}). "
                "Run one forward first, so that lazy modules learn their shapes."
            )
        self.canonical_of_id = {id(param): name for name, param in self.params.items()}
        self.aliases = {
            name: self.canonical_of_id[id(param)] for name, param in model.named_parameters(remove_duplicate=False)
        }
        self.position = {name: at for at, name in enumerate(self.params)}

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Every name of every module; the model itself is ``""``."""
        return dict(self.model.named_modules(remove_duplicate=False))

    @cached_property
    def _aliases_in(self) -> dict[str, list[str]]:
        inside: dict[str, list[str]] = {}
        for alias in self.aliases:
            for prefix in _prefixes(alias):
                inside.setdefault(prefix, []).append(alias)
        return inside

    @cached_property
    def num_inside(self) -> dict[str, int]:
        """Module name -> elements of the parameters first registered inside; a tie counts at its first place only."""
        count: dict[str, int] = {}
        for name, param in self.params.items():
            for prefix in _prefixes(name):
                count[prefix] = count.get(prefix, 0) + param.numel()
        return count

    def aliases_in(self, module_name: str) -> list[str]:
        """Return every name, ties included, of the parameters inside a module."""
        return self._aliases_in.get(module_name, [])

    def params_of(self, module_name: str) -> list[str]:
        """Return the canonical names of the parameters inside a module, in the order of the model."""
        return self.canonical(self.aliases_in(module_name))

    def canonical(self, aliases: Iterable[str]) -> list[str]:
        """Return the parameters that these names stand for, each once, in the order of the model."""
        return sorted({self.aliases[alias] for alias in aliases}, key=self.position.__getitem__)

    def children_of(self, module_name: str) -> list[str]:
        """Return a module's child modules that hold parameters, in registration order."""
        children = (_join(module_name, child) for child, _ in self.modules[module_name].named_children())
        return [child for child in children if self.aliases_in(child)]

    def name_of(self, module: nn.Module) -> str | None:
        """Return a module's first name by identity, or None if it is not inside the model."""
        return next((name for name, inside in self.modules.items() if inside is module), None)

    def owner_of(self, name: str) -> nn.Module:
        """Return the module that owns a parameter."""
        return self.modules[name.rpartition(".")[0]]

    def tie_note(self, aliases: Iterable[str]) -> str:
        """Say which of these names are ties to a parameter known by another name."""
        ties = [f"{alias} is tied to {self.aliases[alias]}" for alias in aliases if self.aliases[alias] != alias]
        return "; ".join(ties[:3]) + (f"; and {len(ties) - 3} more ties" if len(ties) > 3 else "")


def _prefixes(name: str) -> Iterator[str]:
    """Yield the names of every module around a parameter: ``a.b.weight`` gives ``""``, ``a``, ``a.b``."""
    yield ""
    at = name.find(".")
    while at != -1:
        yield name[:at]
        at = name.find(".", at + 1)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _trains(param: torch.Tensor) -> bool:
    """Whether autograd can train it: floating or complex; integers, bools and quantised ones cannot."""
    return param.dtype.is_floating_point or param.dtype.is_complex


# ------------------------------------------------------------------------------------------------------ built-ins


def _own_name(name: str) -> str:
    """Return a parameter's own name; ``fc.parametrizations.bias.original0`` is still ``bias``."""
    parts = name.split(".")
    if "parametrizations" in parts[:-2]:
        return parts[parts.index("parametrizations") + 1]
    return parts[-1]


def _biases(names: _Names) -> list[str]:
    """``@biases``: parameters of at most one dimension with the word ``bias`` in their own name.

    Words are parted by ``_``, and a name ending in ``bias`` counts too: ``bias``, ``in_proj_bias``, ``bias_ih_l0``,
    ``q_bias``. A ``bias_k`` of shape ``[1, 1, E]`` or a table of position biases has more dimensions and is left out.
    """
    return [
        name
        for name, param in names.params.items()
        if param.dim() <= 1 and ("bias" in _own_name(name).split("_") or _own_name(name).endswith("bias"))
    ]


_NORMS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,  # BatchNorm and InstanceNorm, lazy and synchronised ones too
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation.

    Torch's own are known by class. Any other module is one if its class's name holds ``Norm`` (or ends in ``norm``) and
    every parameter it owns itself is a scale, shift or vector: at most one dimension longer than 1.
    """
    if isinstance(module, _NORMS):
        return True
    name = type(module).__name__
    if "Norm" not in name and not name.lower().endswith("norm"):
        return False
    own = list(module.parameters(recurse=False))
    return bool(own) and all(sum(size > 1 for size in param.shape) <= 1 for param in own)


def _norms(names: _Names) -> list[str]:
    """``@norms``: the parameters that normalisation modules (see :func:`_is_norm`) own themselves."""
    owned: set[str] = set()
    for prefix, module in names.modules.items():
        if _is_norm(module):
            own = (_join(prefix, name) for name, _ in module.named_parameters(recurse=False, remove_duplicate=False))
            owned.update(names.aliases[name] for name in own)
    return sorted(owned, key=names.position.__getitem__)


def _declared_head(names: _Names, module_name: str) -> str | None:
    """Return the head a module declares: ``get_output_embeddings()`` (transformers), ``get_classifier()`` (timm)."""
    for method in ("get_output_embeddings", "get_classifier"):
        declare = getattr(names.modules[module_name], method, None)
        if not callable(declare):
            continue
        try:
            head = declare()
        except (AttributeError, NotImplementedError, TypeError):  # declared by a base class for its other children
            continue
        found = names.name_of(head) if isinstance(head, nn.Module) else None
        if found is not None and names.aliases_in(found):
            return found
    return None


def _head(names: _Names) -> str:
    """``@head``: the name of the last module, the one that turns features into outputs.

    From the model, go to the last registered child that holds parameters and is no ``nn.Embedding``. Go on into it as
    long as it is a body rather than a head: it does no more than wrap one such child, or it holds more than half of the
    model's parameters (a tied parameter counts where it is first registered), or it holds the repeated blocks of
    :func:`blocks`. A head that the model declares (``get_output_embeddings()`` or ``get_classifier()``) wins where it
    lies outside the module found so.

    Assumes: modules are registered in the order they run. A model with several heads gives the last of them.
    """
    total = names.num_inside.get("", 0)
    bodies = {prefix for block in _repeated(names) for prefix in _prefixes(block)}
    declared = None
    at = ""
    while children := names.children_of(at):
        declared = declared or _declared_head(names, at)
        owns_some = any(True for _ in names.modules[at].parameters(recurse=False))
        wraps_one = len(children) == 1 and not owns_some
        if at != "" and at not in bodies and not wraps_one and 2 * names.num_inside.get(at, 0) <= total:
            break
        at = next(
            (child for child in reversed(children) if not _is_embedding_module(names.modules[child])), children[-1]
        )
    if declared is not None and not _within(declared, at):
        return declared
    return at


def _head_aliases(names: _Names) -> list[str]:
    """Return every name of the parameters that ``@head`` trains."""
    return [alias for alias in names.aliases_in(_head(names)) if not _is_replaced(alias, names)]


def _is_replaced(name: str, names: _Names) -> bool:
    """Whether a parameter is the original that peft keeps beside the copy it trains (``modules_to_save``)."""
    outer, found, _ = name.partition(".original_module.")
    return bool(found) and f"{outer}.modules_to_save" in names.modules


def _within(name: str, module_name: str) -> bool:
    """Whether a parameter or module is a module or inside it, by name."""
    return module_name == "" or name == module_name or name.startswith(module_name + ".")


# --------------------------------------------------------------------------------------------------------- blocks


@dataclass(frozen=True)
class _Stack:
    """A container of alike modules."""

    path: str
    kind: type[nn.Module]  # the class most of its children have
    blocks: tuple[str, ...]


def _stack_at(names: _Names, path: str) -> _Stack | None:
    """Read a ModuleList, ModuleDict or Sequential whose children are built of modules themselves."""
    container = names.modules[path]
    if not isinstance(container, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        return None
    # A block that only holds what is registered elsewhere already (a shared layer) is no block of its own.
    children = [child for child in names.children_of(path) if names.num_inside.get(child)]
    kinds = Counter(type(names.modules[child]) for child in children if names.children_of(child))
    if not kinds:
        return None
    kind = kinds.most_common(1)[0][0]
    if isinstance(container, nn.Sequential):  # a whole network may lie in one: stem, blocks, head
        children = [child for child in children if type(names.modules[child]) is kind]
    return _Stack(path, kind, tuple(children))


def _inner_stack(names: _Names, stage: str) -> _Stack | None:
    """Return the container of modules of one class that makes up most of a stage, or None."""
    for path in names.modules:
        if _within(path, stage) and 2 * names.num_inside.get(path, 0) > names.num_inside.get(stage, 0):
            stack = _stack_at(names, path)
            if stack and all(type(names.modules[block]) is stack.kind for block in stack.blocks):
                return stack
    return None


def _opened(names: _Names, found: tuple[str, ...]) -> tuple[str, ...]:
    """Open stages: where each block holds a container of blocks, and these differ in width from stage to stage.

    Experts in a mixture are containers as well, but have the same shapes in every layer: those stay closed.
    """
    stacks: list[_Stack] = []
    for block in found:
        stack = _inner_stack(names, block)
        if stack is None:
            return found
        stacks.append(stack)
    first = {tuple(names.params[name].shape for name in names.params_of(stack.blocks[0])) for stack in stacks}
    if len(first) < 2:
        return found
    return _opened(names, tuple(block for stack in stacks for block in stack.blocks))


def _siblings(a: str, b: str) -> bool:
    """Whether two containers lie at the same place of two sibling modules: ``encoder.layers``, ``decoder.layers``."""
    left, right = a.split("."), b.split(".")
    return (
        len(left) == len(right)
        and left[-1] == right[-1]
        and sum(mine != theirs for mine, theirs in zip(left, right, strict=True)) == 1
    )


def _repeated(names: _Names) -> tuple[str, ...]:
    """Return the repeated blocks, or nothing if none repeats."""
    unique = [name for name, _ in names.model.named_modules()]
    stacks = [stack for stack in (_stack_at(names, path) for path in unique) if stack]
    kinds: dict[type[nn.Module], list[_Stack]] = {}
    for stack in stacks:
        kinds.setdefault(stack.kind, []).append(stack)
    main: list[_Stack] = []
    most = 0
    for group in kinds.values():  # in registration order, so that of two that hold the same the outer one wins
        alike = sum(type(names.modules[block]) is group[0].kind for stack in group for block in stack.blocks)
        held = sum(names.num_inside.get(block, 0) for stack in group for block in stack.blocks)
        if alike >= 2 and held > most:
            main, most = group, held
    main = [stack for stack in stacks if stack in main or any(_siblings(stack.path, other.path) for other in main)]
    found = tuple(block for stack in main for block in stack.blocks)
    # A block inside another block of the group is a part of it, not a block.
    found = tuple(block for block in found if not set(_prefixes(block)) & set(found))
    return _opened(names, found) if found else ()


def _blocks(names: _Names) -> list[str]:
    if found := _repeated(names):
        return list(found)
    owners = {name.rpartition(".")[0]: None for name in names.params}
    layers = [owner for owner in owners if not _is_norm(names.modules[owner])]
    if len(layers) > 1:
        layers = [owner for owner in layers if owner != ""]  # loose parameters of the model itself: no layer
    return layers or list(owners)


def blocks(model: nn.Module) -> list[str]:
    """Name the blocks that ``@last:K`` counts, first to last.

    The blocks are the children of the ``ModuleList``, ``ModuleDict`` or ``Sequential`` of alike modules (two or more of
    one class, each built of modules itself) that holds the most parameters. Containers of the same class of modules
    (``layer1`` to ``layer4`` of a ResNet; ``encoder.block`` and ``decoder.block`` of a T5), and those at the same
    place of a sibling (``encoder.layers``, ``decoder.layers``), join them in order; stages of different width are
    opened into their blocks. Where nothing repeats, every module that owns parameters itself, norms aside, is a block.

    Assumes: modules are registered in the order they run.

    >>> blocks(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    ['0', '2']
    """
    return _blocks(_Names(model))


def num_blocks(model: nn.Module) -> int:
    """Count the blocks of :func:`blocks`: the largest ``K`` of ``@last:K``."""
    return len(blocks(model))


def _last(names: _Names, text: str) -> tuple[list[str], str]:
    """``@last:K``: the last K blocks, everything registered after them, and ``@head``.

    Left out, and noted: embeddings registered after the first of these blocks but outside of the blocks (they run
    before), and head parameters tied to one registered before (an ``lm_head`` tied to the embedding): training either
    would take backward through the whole network.
    """
    found = _blocks(names)
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise SubsetError(f"'@last:{text}': K must be a whole number from 1 to {len(found)}. Write '@last:1'.")
    if int(text) > len(found):
        raise SubsetError(
            f"'@last:{text}': {type(names.model).__name__} has {len(found)} blocks "
            f"({_listed(found, 3)}). Write '@last:{len(found)}' or less, or '@all'."
        )
    chosen = found[-int(text) :]
    start = min(at for name, at in names.position.items() if not set(_prefixes(name)).isdisjoint(chosen))
    taken: set[str] = set()
    left_out: dict[str, str] = {}
    for name in list(names.params)[start:]:
        if _is_replaced(name, names):
            continue
        if set(_prefixes(name)).isdisjoint(found) and _is_embedding(names, name):
            left_out[name] = f"{name} is left out: an embedding"
        else:
            taken.add(name)
    for alias in _head_aliases(names):
        name = names.aliases[alias]
        if alias != name and names.position[name] < start:
            left_out[name] = f"{alias} is left out: tied to {name}, registered before these blocks"
        else:
            taken.add(name)
            left_out.pop(name, None)
    return sorted(taken, key=names.position.__getitem__), "; ".join(left_out.values())


def _is_embedding(names: _Names, name: str) -> bool:
    """Whether a parameter belongs to an embedding, by class or by a module name with ``embed`` in it."""
    if _is_embedding_module(names.owner_of(name)):
        return True
    return any("embed" in part.lower() for part in name.split("."))


def _is_embedding_module(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


def _built_in(names: _Names, pattern: str) -> tuple[list[str], str]:
    """Resolve ``@name`` to canonical names and a note."""
    word, colon, argument = pattern.partition(":")
    if word == "@last" and colon:
        return _last(names, argument.strip())
    if pattern == "@now":
        return [name for name, param in names.params.items() if param.requires_grad], ""
    if pattern == "@all":
        return [name for name, param in names.params.items() if _trains(param)], ""
    if pattern == "@biases":
        return _biases(names), ""
    if pattern == "@norms":
        return _norms(names), ""
    if pattern == "@head":
        inside = _head_aliases(names)
        return names.canonical(inside), names.tie_note(inside)
    close = difflib.get_close_matches(word, [known.partition(":")[0] for known in BUILT_INS], 1, 0.5)
    hint = f" Did you mean {close[0]}{':K' if close[0] == '@last' else ''}?" if close else ""
    listed = "; ".join(f"{known}: {meaning}" for known, meaning in BUILT_INS.items())
    raise SubsetError(f"no built-in subset is called {pattern!r}.{hint} Built in are {listed}.")


# ------------------------------------------------------------------------------------------------------- patterns


def _split(text: str) -> list[str]:
    """Part a string at its commas; those inside brackets belong to a slice."""
    parts, depth, start = [], 0, 0
    for at, char in enumerate(text):
        depth += (char == "[") - (char == "]")
        if depth < 0 or depth > 1:
            raise SubsetError(f"{text!r}: a bracket at position {at} that does not fit. Write one pair at a time.")
        if char == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    if depth:
        raise SubsetError(f"{text!r}: a '[' is never closed.")
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def _cut(pattern: str) -> tuple[str, str | None]:
    """Part a pattern from its trailing slice: a last bracket that holds ``:`` or ``,``."""
    found = re.fullmatch(r"(?P<name>.*)(?P<slice>\[[^\[\]]*[:,][^\[\]]*\])", pattern)
    return (found["name"].strip(), found["slice"]) if found else (pattern, None)


def _is_glob(pattern: str) -> bool:
    return any(char in pattern for char in "*?[")


def _matching(pattern: str, known: Mapping[str, object]) -> list[str]:
    """Return the names that a pattern matches: itself if it is one of them, or as a glob."""
    if pattern in known:
        return [pattern]
    return [name for name in known if fnmatchcase(name, pattern)] if _is_glob(pattern) else []


@dataclass(frozen=True)
class _Found:
    """What one item of ``train=`` stands for: whole parameters (None) or slices of them."""

    pattern: str
    parts: dict[str, tuple[TensorSlice, ...] | None]
    note: str = ""


def _find(names: _Names, pattern: str) -> _Found:
    """Resolve one pattern, without its ``!``."""
    if pattern.startswith("@"):
        chosen, note = _built_in(names, pattern)
        return _Found(pattern, dict.fromkeys(chosen), note)
    base, cut = (pattern, None) if pattern in names.aliases else _cut(pattern)
    matched = _matching(base, names.aliases)
    if cut is not None:
        if not matched:
            _refuse_slice_of_module(names, pattern, base)
            raise _nothing(names, base, pattern)
        parts: dict[str, tuple[TensorSlice, ...] | None] = {}
        for name in names.canonical(matched):
            part = TensorSlice.parse(cut, names.params[name].shape, name)
            parts[name] = None if part.is_whole else (part,)
        return _Found(pattern, parts, names.tie_note(matched))
    modules = _matching(base, names.modules) if base and base not in names.aliases else []
    inside = [alias for module in modules for alias in names.aliases_in(module)]
    matched = list(dict.fromkeys([*matched, *inside]))
    if not matched:
        if modules:
            kinds = ", ".join(f"{name!r} ({type(names.modules[name]).__name__})" for name in modules[:3])
            raise SubsetError(f"{pattern!r} matches {kinds}, which holds no parameters.")
        raise _nothing(names, base, pattern)
    return _Found(pattern, dict.fromkeys(names.canonical(matched)), names.tie_note(matched))


def _refuse_slice_of_module(names: _Names, pattern: str, base: str) -> None:
    """Raise if the name before a slice is a module's."""
    modules = [name for name in _matching(base, names.modules) if names.aliases_in(name)]
    if modules:
        raise SubsetError(
            f"{pattern!r}: {modules[0]!r} is a module ({type(names.modules[modules[0]]).__name__}) and only "
            f"a parameter can be sliced. It holds {_listed(names.params_of(modules[0]), 4)}."
        )


def _nothing(names: _Names, base: str, pattern: str) -> SubsetError:
    """Say that a pattern matches nothing, what comes closest, and what to do."""
    kind = type(names.model).__name__
    if not names.params:
        return SubsetError(f"{pattern!r} matches nothing: {kind} has no parameters.")
    if any(name == base for name, _ in names.model.named_buffers(remove_duplicate=False)):
        return SubsetError(f"{base!r} is a buffer of {kind}, not a parameter: buffers do not train.")
    close = _closest(names, base, params_only=base != pattern)
    shown = [f"{name} (module)" if name in names.modules else name for name in close[:4]]
    nearby = f"Closest: {', '.join(shown)}" if close else f"It holds {_listed(_outline(names), 4)}"
    message = f"{pattern!r} matches no parameter or module of {kind}. {nearby}."
    literal = base.strip("*.")
    if not _is_glob(literal) and literal and any(literal in alias for alias in names.aliases):
        return SubsetError(f"{message} Write '*{literal}*' for every name that holds it.")
    return SubsetError(f"{message} Print every name with [name for name, _ in model.named_parameters()].")


def _outline(names: _Names) -> list[str]:
    """Return the names a reader would look at first: the top modules, or the parameters of a single layer."""
    return names.children_of("") or list(names.params)


def _closest(names: _Names, base: str, params_only: bool = False) -> list[str]:
    """Return the names most like one that matched nothing, best first; none if none is like it."""
    literal = re.sub(r"\[[^\]]*\]|[*?!]", "", base).strip(".")
    if not literal:
        return []
    known = [] if params_only else [name for name in names.modules if name and names.aliases_in(name)]
    known += names.aliases
    close = [name for name in known if name.endswith(literal) or literal.endswith("." + name)]
    close += difflib.get_close_matches(literal, known, 3, 0.6)
    tails = list(dict.fromkeys(name.rpartition(".")[2] for name in known))
    near = difflib.get_close_matches(literal.rpartition(".")[2], tails, 3, 0.6)
    alike = (name for name in known if name.rpartition(".")[2] in near)
    close += sorted(alike, key=lambda name: _distance(literal, name))
    close += [name for name in known if literal.lower() in name.lower()]
    return list(dict.fromkeys(close))


def _distance(a: str, b: str) -> float:
    return -difflib.SequenceMatcher(None, a, b).ratio()


def _listed(items: list[str], limit: int) -> str:
    """List a few and say how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


# -------------------------------------------------------------------------------------------------------- resolve


def resolve(train: object, model: nn.Module) -> Subset:
    """Say which parameters of ``model`` train. The model is only read, never changed.

    Args:
        train: what trains, as one of

            - None or ``"@now"``: the parameters whose ``requires_grad`` is set now;
            - a name or glob of parameters or modules (``*`` crosses dots): ``"layer2"``, ``"*.bias"``,
              ``"encoder.layer.[01]"``; several parted by commas; a built-in of :data:`BUILT_INS`;
            - a parameter with a trailing slice: ``"embeddings.weight[30522:]"``, ``"fc1.weight[:, :128]"``. Only a
              trailing bracket that holds ``:`` or ``,`` is a slice; any other is a class of characters;
            - an ``nn.Module`` inside the model, Parameters of it, an Optimizer over them, a predicate
              ``(name, parameter) -> bool``, a Plan (anything with a ``subset``) or a Subset;
            - a list of any of these, read in order. A leading ``!`` takes away, and a list that starts with one
              begins from ``@all``.

        model: the model, with real, meta or fake parameters.

    Returns:
        The subset, by canonical names: a parameter that has several names (tied weights) is known by the first one in
        ``model.named_parameters()`` and can be asked for by any.

    Raises:
        SubsetError: something matches nothing, is not in this model, cannot train, or nothing is left to train.
    """
    resolver = _Resolver(_Names(model))
    label = resolver.read(train)
    return resolver.subset(label)


class _Resolver:
    """Reads ``train=`` item by item, adding to what is chosen and taking away from it."""

    def __init__(self, names: _Names) -> None:
        self.names = names
        self.chosen: dict[str, tuple[TensorSlice, ...] | None] = {}  # None: the whole parameter
        self.matched: list[Match] = []
        self.begun = False

    def read(self, train: object) -> str:
        """Read anything ``train=`` accepts and return its label."""
        names = self.names
        if train is None:
            return self.read("@now")
        if isinstance(train, str):
            return self._read_patterns(train)
        if isinstance(train, Subset):
            self._add(self._of_subset(train), train.matched)
            return str(train)
        if isinstance(getattr(train, "subset", None), Subset):  # a Plan
            return self.read(cast("Any", train).subset)
        if isinstance(train, nn.Module):
            return self._read_module(train)
        if isinstance(train, torch.Tensor):
            return self._read_tensors([train], "")
        if isinstance(train, torch.optim.Optimizer) or isinstance(getattr(train, "param_groups", None), list):
            held = [param for group in cast("Any", train).param_groups for param in group["params"]]
            return self._read_tensors(held, f"{type(train).__name__} optimizer")
        if isinstance(train, Mapping):
            raise SubsetError(f"train= is a {type(train).__name__}: pass one of its values. {_ACCEPTED}")
        if isinstance(train, Iterable):
            return self._read_items(list(train))
        if callable(train) and not isinstance(train, type):
            called = getattr(train, "__name__", type(train).__name__)
            label = "predicate" if called == "<lambda>" else f"predicate {called}"
            self._add(_Found(label, dict.fromkeys(_asked(cast("_Predicate", train), names.params))))
            return label
        raise SubsetError(f"train= is {train!r}, which names no parameters. {_ACCEPTED}")

    def _read_patterns(self, text: str) -> str:
        patterns = _split(text)
        if not patterns:
            raise SubsetError(f"train={text!r} holds no pattern. {_ACCEPTED}")
        for pattern in patterns:
            if not pattern.startswith("!"):
                self._add(_find(self.names, pattern))
                continue
            if not self.begun:
                self._add(_find(self.names, "@all"))
            self._take_away(_find(self.names, pattern[1:].strip()))
        return text.strip()

    def _read_module(self, module: nn.Module) -> str:
        name = self.names.name_of(module)
        kind, model_kind = type(module).__name__, type(self.names.model).__name__
        if name is None:
            raise SubsetError(
                f"this {kind} is not a module of this {model_kind}. Modules are found by identity, so a copy "
                "is another module: pass its name instead."
            )
        inside = self.names.params_of(name)
        label = f"module {name}" if name else f"module {kind}"
        if not inside:
            raise SubsetError(f"{label} ({kind}) holds no parameters.")
        note = self.names.tie_note(self.names.aliases_in(name))
        self._add(_Found(label, dict.fromkeys(inside), note))
        return label

    def _read_tensors(self, tensors: list[torch.Tensor], label: str) -> str:
        foreign = [tensor for tensor in tensors if id(tensor) not in self.names.canonical_of_id]
        kind = type(self.names.model).__name__
        if foreign:
            holder = f"the {label} holds" if label else "train= holds"
            alike = [name for name, param in self.names.params.items() if param.shape == foreign[0].shape]
            hint = f" ({alike[0]!r} has this shape)" if alike else ""
            raise SubsetError(
                f"{holder} {len(foreign)} tensors that are not parameters of this {kind}, the first of shape "
                f"{_shape(foreign[0].shape)}{hint}. Parameters are found by identity, so a copy is another parameter: "
                "pass names instead, or the model they belong to."
            )
        found = [self.names.canonical_of_id[id(tensor)] for tensor in tensors]
        if not label:
            label = found[0] if len(found) == 1 else f"{len(found)} parameters"
        if not found:
            raise SubsetError(f"{label}: there is nothing in it to train.")
        for name in found:
            if not _trains(self.names.params[name]):
                raise self._cannot_train(label, [name])
        frozen = sum(not self.names.params[name].requires_grad for name in found)
        note = f"{frozen} of them frozen now" if frozen and label.endswith("optimizer") else ""
        ordered = sorted(found, key=self.names.position.__getitem__)
        self._add(_Found(label, dict.fromkeys(ordered), note))
        return label

    def _read_items(self, items: list[object]) -> str:
        """Read a list. Neighbouring Parameters make one item; pairs of ``named_parameters()`` stand for theirs."""
        if not items:
            raise SubsetError(f"train= is empty: it would train nothing. {_ACCEPTED}")
        labels: list[str] = []
        held: list[torch.Tensor] = []
        for item in [*items, _END]:
            if isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], torch.Tensor):
                item = item[1]
            if isinstance(item, torch.Tensor):
                held.append(item)
                continue
            if held:
                labels.append(self._read_tensors(held, ""))
                held = []
            if item is not _END:
                labels.append(self.read(item))
        return ",".join(labels)

    def _of_subset(self, subset: Subset) -> _Found:
        """Check a subset, perhaps made for another model, against this one."""
        names = self.names
        kind = type(names.model).__name__
        missing = [name for name in subset.names if name not in names.aliases]
        if missing:
            raise SubsetError(
                f"the subset {str(subset)!r} holds {len(missing)} parameters that this {kind} does not have, the first "
                f"{missing[0]!r}. This model holds {_listed(_outline(names), 4)}. Resolve the subset for this model."
            )
        parts: dict[str, tuple[TensorSlice, ...] | None] = {}
        for alias in subset.names:
            name = names.aliases[alias]
            shape = tuple(names.params[name].shape)
            pieces = subset.slices.get(alias)
            known = subset.shapes.get(alias, pieces[0].tensor_shape if pieces else shape)
            if tuple(known) != shape:
                raise SubsetError(
                    f"the subset {str(subset)!r} knows {alias!r} with shape {_shape(known)}, but in this {kind} it has "
                    f"shape {_shape(shape)}. Resolve it for this model."
                )
            parts[name] = _union((), pieces) if pieces else None
        return _Found(str(subset), parts)

    def _cannot_train(self, pattern: str, cannot: list[str]) -> SubsetError:
        dtype = self.names.params[cannot[0]].dtype
        rest = f", nor can {len(cannot) - 1} more that it matched" if len(cannot) > 1 else ""
        return SubsetError(
            f"{pattern!r} matched {cannot[0]!r}, which is {dtype} and cannot train{rest}: gradients need "
            "a floating-point or complex dtype. Choose other parameters, or train an adapter beside it."
        )

    def _add(self, found: _Found, matched: tuple[Match, ...] = ()) -> None:
        """Add what an item stands for. ``matched`` is what it matched when it was first resolved, if it was."""
        cannot = [name for name in found.parts if not _trains(self.names.params[name])]
        kept = {name: parts for name, parts in found.parts.items() if name not in cannot}
        if cannot and not kept:
            raise self._cannot_train(found.pattern, cannot)
        note = found.note
        if cannot:
            skipped = f"left out {_listed(cannot, 2)}: {self.names.params[cannot[0]].dtype} cannot train"
            note = f"{note}; {skipped}" if note else skipped
        if not kept:
            raise SubsetError(_matched_nothing(found.pattern, self.names))
        self.begun = True
        for name, parts in kept.items():
            before = self.chosen.get(name, ())
            if parts is None or before is None:
                self.chosen[name] = None
                continue
            self.chosen[name] = _whole_or(_union(before, parts), name)
        self.matched.extend(matched or [Match(found.pattern, _spell(kept), note)])

    def _take_away(self, found: _Found) -> None:
        if not found.parts:
            raise SubsetError(_matched_nothing(found.pattern, self.names))
        gone: dict[str, tuple[TensorSlice, ...] | None] = {}
        for name, parts in found.parts.items():
            if name not in self.chosen:
                continue
            gone[name] = parts
            before = self.chosen.pop(name)
            if parts is None:
                continue
            rest = list(before if before is not None else (TensorSlice.whole(self.names.params[name].shape),))
            for part in parts:
                rest = [piece for old in rest for piece in old.minus(part)]
            if rest:
                self.chosen[name] = _few(_merged(_few(rest, name)), name)
        self.matched.append(Match(f"!{found.pattern}", _spell(gone), found.note))

    def subset(self, label: str) -> Subset:
        """Return what was chosen, in the order of the model."""
        if not self.chosen:
            raise SubsetError(f"train={label!r} leaves nothing to train: every parameter it matched was taken away.")
        ordered = sorted(self.chosen, key=self.names.position.__getitem__)
        slices = {name: parts for name in ordered if (parts := self.chosen[name]) is not None}
        shapes = {name: tuple(int(size) for size in self.names.params[name].shape) for name in ordered}
        return Subset(tuple(ordered), slices, label, tuple(self.matched), shapes)


_Predicate = Callable[[str, nn.Parameter], object]
_END = object()
_ACCEPTED = (
    "Pass a name or glob ('layer2', '*.bias'), a list of them, a built-in "
    f"({', '.join(BUILT_INS)}), a module, parameters, an optimizer, a predicate (name, parameter) -> bool, or a Subset."
)


def _asked(predicate: _Predicate, params: Mapping[str, nn.Parameter]) -> list[str]:
    """Ask a predicate about every parameter."""
    chosen: list[str] = []
    for name, param in params.items():
        try:
            if predicate(name, param):
                chosen.append(name)
        except Exception as error:
            error.add_note(f"raised by the predicate passed as train=, called with ({name!r}, parameter)")
            raise
    return chosen


def _matched_nothing(pattern: str, names: _Names) -> str:
    """Say why a built-in or predicate is empty, and what to do."""
    kind = type(names.model).__name__
    if not names.params:
        return f"{pattern}: {kind} has no parameters, so there is nothing to train."
    if pattern == "@now":
        return (
            f"@now: no parameter of {kind} requires grad now, so nothing would train. "
            "Say what trains, as in train='@head', or call requires_grad_(True) first."
        )
    return f"{pattern} matches none of the {len(names.params)} parameters of {kind}. Try '@all', or name some."


def _spell(parts: Mapping[str, tuple[TensorSlice, ...] | None]) -> tuple[str, ...]:
    return tuple(f"{name}{piece}" for name, pieces in parts.items() for piece in (pieces or ("",)))


def _union(before: tuple[TensorSlice, ...], parts: tuple[TensorSlice, ...]) -> tuple[TensorSlice, ...]:
    """Join parts that may overlap into parts that do not."""
    pieces = list(before)
    for part in parts:
        fresh = [part]
        for old in pieces:
            fresh = [piece for new in fresh for piece in new.minus(old)]
        pieces += fresh
    return _merged(_few(pieces, "one tensor"))


def _whole_or(parts: tuple[TensorSlice, ...], name: str) -> tuple[TensorSlice, ...] | None:
    """Return None, the whole tensor, if parts that do not overlap cover all of it."""
    if sum(part.numel for part in parts) == math.prod(parts[0].tensor_shape):
        return None
    return tuple(_few(list(parts), name))


def _few(parts: Any, name: str) -> Any:
    """Refuse more slices of one tensor than anyone can read."""
    if len(parts) > MAX_PIECES:
        raise SubsetError(f"{name} falls into {len(parts)} slices, more than {MAX_PIECES}. Write larger slices.")
    return parts
