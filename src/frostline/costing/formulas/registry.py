"""Where formulas are kept: by name, so that an op that this torch does not have costs nothing to mention."""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from torch._ops import OpOverload, OpOverloadPacket

Arguments = Mapping[str, Any]
"""An op's arguments by the names in its schema, defaults filled in."""

Outputs = tuple[Any, ...]
"""Metadata of an op's outputs, flat; None where an output is undefined."""

Count = int | tuple[int, ...] | None
"""FLOPs: of the first output, or one int for each leading output (the rest cost 0); None: this call has no count."""

Formula = Callable[[Arguments, Outputs], Count]
UserFormula = Callable[[tuple[Any, ...], dict[str, Any], Outputs], int | tuple[int, ...]]

FORMULAS: dict[str, Formula] = {}
USER_FORMULAS: dict[OpOverload | OpOverloadPacket, UserFormula] = {}


def counts(*names: str) -> Callable[[Formula], Formula]:
    """Register a formula of ours for packets such as ``"aten::mm"``: for all their overloads, ``out=`` included."""

    def register(formula: Formula) -> Formula:
        for name in names:
            assert name not in FORMULAS, f"two formulas for {name}"
            FORMULAS[name] = formula
        return formula

    return register


def bind(op: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Name a call's arguments as the op's schema does, and fill in the defaults that the call left out.

    >>> import torch
    >>> bind(torch.ops.aten.addmm.default, ("b", "x", "w"), {"beta": 2})
    {'self': 'b', 'mat1': 'x', 'mat2': 'w', 'beta': 2, 'alpha': 1}
    """
    bound: dict[str, Any] = {}
    for position, argument in enumerate(op._schema.arguments):
        if position < len(args):
            bound[argument.name] = args[position]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
        else:
            raise TypeError(f"{op} was called without its argument {argument.name!r}")
    return bound


def numel(tensor: Any) -> int:
    """Number of elements of a tensor or of its metadata."""
    return prod(tensor.shape)
