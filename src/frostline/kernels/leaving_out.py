"""Leaving tensors out of what torch's own node saves, where its backward takes them and does not read them.

The node saves stand-ins for them. Once it is made, `leave_out` sets hooks on those of its saved tensors alone; all
others stay as torch saved them. Where the user has saved-tensor hooks set, which are not to see what is left out, it is
made within a `LeaveOut`, which gives them the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .unread import Looks, unread_later

_hooks: Any = torch._C._autograd
_top_hooks = _hooks._top_saved_tensors_default_hooks
_push_hooks = _hooks._push_saved_tensors_default_hooks
_pop_hooks = _hooks._pop_saved_tensors_default_hooks


def leave_out(node: Any, names: Iterable[str]) -> None:
    """Have ``node`` let go of what it saved under those names. To be called where no mode is on, or `aside`."""
    for name in names:
        getattr(node, f"_raw_saved_{name}").register_hooks(_stand_in, _unpack)


def _stand_in(tensor: Tensor) -> Callable[[], Tensor]:
    return unread_later(Looks.of(tensor), tensor)


class LeaveOut:
    """A context in which nodes do not save the tensors given; it is also the hook that says what they save.

    To be entered where the user's own hooks are set.
    """

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
            return _stand_in(tensor)
        pack, unpack = self._users
        return partial(unpack, pack(tensor))


def _unpack(packed: Callable[[], Tensor]) -> Tensor:
    return packed()


def users_hooks() -> Any:
    """The user's saved-tensor hooks that are on top: what `torch._C` says, but for ours. None if there are none."""
    hooks = _top_hooks(True)
    return hooks[0]._users if hooks is not None and isinstance(hooks[0], LeaveOut) else hooks


def hooks_disabled() -> bool:
    """Whether somebody forbids saved-tensor hooks here."""
    return not _hooks._saved_tensors_hooks_is_enabled()
