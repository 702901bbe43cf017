"""What an optimizer's step does to parameters that were not to move: frozen ones, and rows that a hook masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from frostline.watching.record import LeakFact, MovedFact, OptimizerFact, ParameterFact, Record

_MOST_LOOKS = 4  # at the frozen parameters of one optimizer


class Moves:
    """Looks at the values of suspicious parameters before and after a step; the others are left alone.

    Args:
        safely: calls what a hook of ours does, which is called in the midst of the user's backward.
    """

    def __init__(self, record: Record, safely: Callable[..., None]) -> None:
        self.record = record
        self._safely = safely
        self._looks: dict[int, int] = {}
        self._frozen: list[tuple[int, Tensor, Tensor, float, bool]] = []
        self._rows: list[tuple[int, Tensor, Tensor, float]] = []
        self._open: dict[int, Tensor] = {}  # per masked parameter: the rows that any step had a gradient for
        self._leaks: list[tuple[int, int, Tensor, Tensor, float]] = []  # masked rows, and how far each moved
        self._raw: dict[int, Tensor] = {}  # per masked parameter: the rows whose gradient was not zero before its hooks
        self._watched: dict[int, Any] = {}

    def before(self, fact: OptimizerFact, known: dict[int, ParameterFact], *, inspect: bool) -> None:
        self._frozen.clear()
        self._rows.clear()
        looks = self._looks.get(fact.number, 0)
        for group in fact.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in known:
                    if parameter.grad is not None:
                        self.record.stray.add(id(parameter))
                elif not parameter.requires_grad:
                    has = parameter.grad is not None
                    if looks < _MOST_LOOKS and has:
                        momentum = float(group.get("momentum", 0.0) or 0.0)
                        self._frozen.append((id(parameter), parameter, parameter.detach().clone(), momentum, has))
                elif id(parameter) in self._watched:
                    self._look_at_rows(parameter, group, inspect=inspect)
        if self._frozen:
            self._looks[fact.number] = looks + 1

    def _look_at_rows(self, parameter: Tensor, group: dict[str, Any], *, inspect: bool) -> None:
        if parameter.grad is None or parameter.grad.is_sparse:
            return
        has = (parameter.grad.detach().flatten(1) != 0).any(1)
        self._open[id(parameter)] = has | self._open.get(id(parameter), has)
        raw = self._raw.pop(id(parameter), None)
        if raw is None or not inspect:
            return
        masked = raw & ~has
        if masked.any():
            decay = float(group.get("weight_decay", 0.0) or 0.0)
            self._rows.append((id(parameter), parameter, parameter.detach().clone(), decay))
            self._raw[id(parameter)] = masked

    def watch(self, parameter: Tensor) -> None:
        """Note which rows of a gradient are not zero before the user's own hooks see it."""
        if id(parameter) in self._watched or parameter.dim() < 2:
            return

        def note(gradient: Tensor) -> None:
            self._safely(self._note_rows, parameter, gradient)

        handle = parameter.register_hook(note)
        hooks: Any = parameter._backward_hooks
        others = [(key, hook) for key, hook in hooks.items() if key != handle.id]
        hooks.clear()  # (torch walks the plain dict inside: OrderedDict.move_to_end would not be seen)
        hooks.update([(handle.id, note), *others])
        self._watched[id(parameter)] = handle

    def _note_rows(self, parameter: Tensor, gradient: Tensor) -> None:
        if gradient.layout is not torch.strided:
            return
        rows = (gradient.detach().flatten(1) != 0).any(1)
        before = self._raw.get(id(parameter))
        self._raw[id(parameter)] = rows if before is None else rows | before

    def after(self, fact: OptimizerFact) -> None:
        for number, parameter, before, momentum, has in self._frozen:
            most = _most(parameter, before)
            if most:
                self.record.frozen_moves.append(
                    MovedFact(number, fact.number, self.record.num_steps + 1, most, momentum, has)
                )
        for number, parameter, before, decay in self._rows:
            masked = self._raw.pop(number)
            moved = (parameter.detach() - before).flatten(1).abs().amax(1)
            self._leaks.append((number, fact.number, masked, moved, decay))
        self._frozen.clear()
        self._rows.clear()

    def close(self) -> None:
        for handle in self._watched.values():
            handle.remove()
        self._watched.clear()
        for number, optimizer, rows, moved, decay in self._leaks:
            masked = rows & ~self._open[number]  # other rows each step: a gradient made sparse, no mask
            changed = masked & (moved != 0)
            if changed.any():
                counts = (int(masked.sum()), int(changed.sum()), len(rows))
                self.record.leaks.append(LeakFact(number, optimizer, *counts, float(moved[changed].max()), decay))
        self._leaks.clear()


def _most(after: Tensor, before: Tensor) -> float:
    with torch.no_grad():
        return float((after.detach() - before).abs().max()) if before.numel() else 0.0
