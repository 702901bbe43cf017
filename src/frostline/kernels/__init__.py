"""A stand-in for the room to come: the interface alone, and eager's kernels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

__all__ = ["fallbacks", "kernels_active", "lean_kernels", "settle"]


@contextmanager
def lean_kernels() -> Iterator[None]:
    """Kernels that keep only what the asked gradients read, for this thread; here it does nothing."""
    yield


def kernels_active() -> bool:
    """Whether this thread runs under `lean_kernels`."""
    return False


def fallbacks() -> Mapping[str, Mapping[str, int]]:
    """Which ops ran by eager's own kernel because their case is not covered: op -> why -> how often."""
    return {}


def settle() -> None:
    """Pack all that can be packed, wherever it is held."""
