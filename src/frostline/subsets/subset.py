"""The value: which parameters train, or which slices of them, and what each pattern matched."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from frostline.errors import SubsetError
from frostline.subsets.slices import TensorSlice


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
