"""How many FLOPs one op call costs.

Multiply-adds of contractions (matrix products, convolutions, attention, recurrent layers, direct solvers) are counted,
2 FLOPs each, one op family a file; a complex multiply-add is four real ones. Ops that contract nothing are free by
declaration (``free.py``). For all others the answer is None, which is not 0: among them sparse products, Fourier
transforms (a plan's real count is known to the FFT library alone), and iterative or blocked decompositions.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket

from ...errors import FrostlineError
from . import attention, convolution, linalg, matmul, recurrent  # noqa: F401  (each registers its formulas)
from .free import is_free
from .registry import FORMULAS, USER_FORMULAS, Outputs, UserFormula, bind

__all__ = ["flops", "register_flops", "unregister_flops"]


def flops(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Outputs) -> tuple[int, ...] | None:
    """Count the FLOPs of one op call.

    Args:
        op: the overload that was called.
        args, kwargs: its arguments, with metadata (``shape``, ``dtype``) or real tensors for the tensors.
        outputs: metadata of its outputs, flat; None where an output is undefined.

    Returns:
        FLOPs for each entry of ``outputs``, or None if there is no formula: list the op as uncounted. Kernels that
        compute several gradients at once book shared work on one of them, as their formulas say.

    Raises:
        FrostlineError: a registered formula counts more outputs than the call has.

    >>> import torch
    >>> x, w = torch.empty(8, 32), torch.empty(32, 4)
    >>> flops(torch.ops.aten.mm.default, (x, w), {}, (torch.empty(8, 4),))
    (2048,)
    """
    user = USER_FORMULAS.get(op) or USER_FORMULAS.get(getattr(op, "overloadpacket", op))
    if user is not None:
        return _spread(op, user(args, kwargs, outputs), len(outputs))
    if not isinstance(op, OpOverload):  # a higher-order op
        return None
    formula = FORMULAS.get(op._schema.name)
    if formula is None:
        return (0,) * len(outputs) if is_free(op) else None
    bound = bind(op, args, kwargs)
    if any(getattr(value, "is_nested", False) for value in bound.values()):
        return None
    if any(_is_sparse(value) for value in bound.values()):
        return None
    count = formula(bound, outputs)
    if count is None:
        return None
    real_products = 4 if any(_is_complex(value) for value in bound.values()) else 1
    return tuple(real_products * each for each in _spread(op, count, len(outputs)))


def register_flops(op: OpOverload | OpOverloadPacket) -> Callable[[UserFormula], UserFormula]:
    """Give an op, or all overloads of a packet, a formula of your own; it goes before ours.

    The formula gets the call's ``args``, ``kwargs`` and ``outputs`` as ``flops`` does and returns the FLOPs: an int
    for the first output, or a tuple with one int for each. Undone by ``unregister_flops(op)``.

    >>> import torch
    >>> op = torch.ops.aten.linalg_qr.default
    >>> @register_flops(op)
    ... def qr_flops(args, kwargs, outputs):
    ...     m, n = args[0].shape
    ...     return 2 * m * n * n
    >>> flops(op, (torch.empty(4, 2),), {}, (torch.empty(4, 2), torch.empty(2, 2)))
    (32, 0)
    >>> unregister_flops(op)
    """

    def register(formula: UserFormula) -> UserFormula:
        USER_FORMULAS[op] = formula
        return formula

    return register


def unregister_flops(op: OpOverload | OpOverloadPacket) -> None:
    """Forget the formula that ``register_flops(op)`` gave; ours, if there is one, holds again."""
    USER_FORMULAS.pop(op, None)


def _spread(op: OpOverload, count: int | tuple[int, ...], num_outputs: int) -> tuple[int, ...]:
    """One int for each output: those that ``count`` leaves out, behind the ones it names, are 0."""
    each = (count,) if isinstance(count, int) else tuple(count)
    if len(each) > num_outputs and any(each[num_outputs:]):
        raise FrostlineError(
            f"the FLOP formula of {op} counts {len(each)} outputs, but this call has {num_outputs}. "
            "Pass None for an output that is undefined; a formula returns an int, or a tuple with one int an output."
        )
    return (each + (0,) * num_outputs)[:num_outputs]


def _tensors(value: Any) -> Iterator[Any]:
    """Tensors, or their metadata, in one argument."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "shape") and hasattr(value, "dtype"):
        yield value


def _is_complex(value: Any) -> bool:
    return any(tensor.dtype.is_complex for tensor in _tensors(value))


def _is_sparse(value: Any) -> bool:
    layouts = (getattr(tensor, "layout", torch.strided) for tensor in _tensors(value))
    return any(str(layout).startswith("torch.sparse_") for layout in layouts)
