"""What flows through a model in one step: shapes and values module by module, gradients and updates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from frostline.watching.tape import leaves

_SATURATES = {
    nn.Sigmoid: (0.01, 0.99),
    nn.Hardsigmoid: (0.01, 0.99),
    nn.Tanh: (-0.99, 0.99),
    nn.Hardtanh: (-0.99, 0.99),
}
"""Modules whose outputs have two ends, and where these are near."""


@dataclass(eq=False)
class ValueFact:
    """One call of a module that has no modules inside, or of a whole model.

    Attributes:
        inputs, outputs: dtypes and shapes, ``float32[8, 16]``.
        mean, std, zeros: of the first floating-point output; ``zeros`` is the share of elements that are 0. NaN and
            infinity are left out of mean and std.
        nonfinite: how many elements of it are NaN or infinite; ``input_nonfinite`` the same of the inputs.
        idle: the share of units (channels of dimension 1) that are 0 for the whole batch, or at one end of a sigmoid or
            tanh; None where that has no meaning.
        gradient_norm: of the module's own parameters together, before the optimizer's step; None without any.
        update_ratio: the norm of what the step added to these, over their own norm.
    """

    module: str
    kind: str
    step: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    mean: float | None
    std: float | None
    zeros: float | None
    nonfinite: int
    input_nonfinite: int
    idle: float | None
    gradient_norm: float | None = None
    update_ratio: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, which has no NaN: such a norm is None."""
        return {
            key: list(value)
            if isinstance(value, tuple)
            else None
            if isinstance(value, float) and not math.isfinite(value)
            else value
            for key, value in vars(self).items()
        }


class Values:
    """Collects the values of the latest step that is inspected, and where a NaN or infinity appeared first."""

    def __init__(self) -> None:
        self.rows: list[ValueFact] = []
        self.first_nonfinite: ValueFact | None = None
        self._own: dict[str, list[nn.Parameter]] = {}
        self._before: dict[str, list[Tensor]] = {}

    def called(
        self, name: str, module: nn.Module, args: Any, kwargs: Any, result: Any, step: int, *, full: bool
    ) -> None:
        """Note one call. Without ``full``, only whether it is the first to give something that is not finite."""
        if not full and (self.first_nonfinite is not None or _all_finite(result)):
            return
        fact = _fact(name, module, args, kwargs, result, step)
        if fact.nonfinite and self.first_nonfinite is None:
            self.first_nonfinite = fact
        if not full:
            return
        if self.rows and self.rows[0].step != step:
            self.rows, self._own = [], {}
        self.rows.append(fact)
        own = [p for p in module.parameters(recurse=False) if p.is_floating_point()]
        if own:
            self._own[name] = own

    def before_step(self) -> None:
        """Note the gradients, and keep the weights to say by how much they will have moved."""
        self._before = {name: [p.detach().clone() for p in own] for name, own in self._own.items()}
        norms = {
            name: _norm([p.grad.detach() for p in own if p.grad is not None and not p.grad.is_sparse])
            for name, own in self._own.items()
        }
        for row in self.rows:
            row.gradient_norm = norms.get(row.module)

    def after_step(self) -> None:
        """Note by how much the weights moved. Of several optimizers' steps the moves add up in the last one's."""
        for row in self.rows:
            before = self._before.get(row.module)
            if before is not None:
                moved = _norm([p.detach() - old for p, old in zip(self._own[row.module], before, strict=True)])
                size = _norm(before)
                if moved and size:
                    row.update_ratio = moved / size
                elif row.update_ratio is None:
                    row.update_ratio = 0.0 if size else None
        self._before = {}


def _fact(name: str, module: nn.Module, args: Any, kwargs: Any, result: Any, step: int) -> ValueFact:
    with torch.no_grad():
        outputs = list(leaves(result))
        given = list(leaves((args, kwargs)))
        first = next((tensor.detach() for tensor in outputs if tensor.is_floating_point()), None)
        mean = std = zeros = idle = None
        nonfinite = 0
        if first is not None and first.numel():
            finite = torch.isfinite(first)
            nonfinite = int((~finite).sum())
            values = first[finite].double() if nonfinite else first.double()
            if values.numel():
                mean = float(values.mean())
                std = float(values.std(correction=0))
            zeros = float((first == 0).double().mean())
            idle = _idle(module, first)
        bad = sum(int((~torch.isfinite(tensor)).sum()) for tensor in given if tensor.is_floating_point())
    return ValueFact(
        name,
        type(module).__name__,
        step,
        _described(given),
        _described(outputs),
        mean,
        std,
        zeros,
        nonfinite,
        bad,
        idle,
    )


def _idle(module: nn.Module, output: Tensor) -> float | None:
    """The share of units that say the same whatever comes in."""
    if output.dim() < 2 or output.shape[0] < 2:
        return None
    ends = _SATURATES.get(type(module))
    if ends is not None:
        stuck = (output <= ends[0]) | (output >= ends[1])
    elif "relu" in type(module).__name__.lower():
        stuck = output == 0
    else:
        return None
    others = [dim for dim in range(output.dim()) if dim != 1]
    return float(stuck.movedim(1, 0).flatten(1).all(1).double().mean()) if others else None


def _all_finite(result: Any) -> bool:
    with torch.no_grad():
        return all(
            bool(torch.isfinite(tensor.detach().sum())) or bool(torch.isfinite(tensor.detach()).all())
            for tensor in leaves(result)
            if tensor.is_floating_point()
        )


def _described(tensors: list[Tensor]) -> tuple[str, ...]:
    return tuple(f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" for tensor in tensors)


def _norm(tensors: list[Tensor]) -> float | None:
    if not tensors:
        return None
    return float(torch.stack([torch.linalg.vector_norm(tensor.double()).cpu() for tensor in tensors]).norm())
