"""Leaving tensors out of what torch's own node saves, where its backward takes them and does not read them.

While a `LeaveOut` is entered, the node that is made saves stand-ins for those tensors. This goes through torch's
saved-tensor hooks, set around one op: so what hooks switch off is done here. A tensor that is saved as it is has its
version checked when it is read, and hooks of the user's get what they would have got without ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .holding import modified
from .unread import Looks, unread_later

_hooks: Any = torch._C._autograd
_top_hooks = _hooks._top_saved_tensors_default_hooks
_push_hooks = _hooks._push_saved_tensors_default_hooks
_pop_hooks = _hooks._pop_saved_tensors_default_hooks


class LeaveOut:
    """A context in which nodes do not save the tensors given; it is also the hook that says what they save."""

    __slots__ = ("_left", "_users")

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._left = tuple(map(id, tensors))  # (not the tensors: who dies last would tell a holder too early)

    def __enter__(self) -> LeaveOut:
        self._users = _top_hooks(True)
        _push_hooks(self, _unpack)
        return self

    def __exit__(self, *_exc: object) -> None:
        _pop_hooks()

    def __call__(self, tensor: Tensor) -> Callable[[], Tensor]:
        if id(tensor) in self._left:
            return unread_later(Looks.of(tensor), tensor)
        if self._users is None:
            return Kept(tensor)
        pack, unpack = self._users
        return partial(unpack, pack(tensor))


class Kept:
    """A tensor that a node saves as it is."""

    __slots__ = ("_version", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._version = tensor._version

    def __call__(self) -> Tensor:
        tensor = self.tensor
        if tensor._version != self._version:
            raise modified(tensor, self._version)
        return tensor


def _unpack(packed: Callable[[], Tensor]) -> Tensor:
    return packed()


def users_hooks() -> Any:
    """The user's saved-tensor hooks that are on top: what `torch._C` says, but for ours. None if there are none."""
    hooks = _top_hooks(True)
    return hooks[0]._users if hooks is not None and isinstance(hooks[0], LeaveOut) else hooks


def hooks_disabled() -> bool:
    """Whether somebody forbids saved-tensor hooks here."""
    return not _hooks._saved_tensors_hooks_is_enabled()
