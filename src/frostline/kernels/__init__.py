"""Autograd kernels that keep only what the asked gradients read.

`lean_kernels` turns them on for one thread of control. A few ops keep more for backward than it will read when some of
their inputs are frozen, or 32 bits where it reads one; inside, these run by torch's own kernel with what is not read
left out, or as Functions that keep less, and give the same gradients, to the bit. Every other op, and every case of
these that is not covered, runs as ever.
"""

from . import activation, convolution, dropout, normalization, pooling  # noqa: F401 (each registers its rules)
from .function import is_replaced
from .holding import Holder, settle
from .lean import (
    LeanKernels,
    eager_kernels,
    fallbacks,
    holders,
    kernels_active,
    lean_kernels,
    replaced_ops,
    watched_kernels,
)
from .leaving_out import users_hooks
from .unread import takes_no_memory

__all__ = [
    "Holder",
    "LeanKernels",
    "eager_kernels",
    "fallbacks",
    "holders",
    "is_replaced",
    "kernels_active",
    "lean_kernels",
    "replaced_ops",
    "settle",
    "takes_no_memory",
    "users_hooks",
    "watched_kernels",
]
