"""The tensors that loss functions bring with them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from frostline.fitting.losses import tensors_of, with_tensors

SCALE = torch.ones(3)


def by_global(outputs: Tensor) -> Tensor:
    return (outputs * SCALE).sum()


def by_argument(outputs: Tensor, target: Tensor, *, weight: Tensor) -> Tensor:
    return ((outputs - target) * weight).sum()


def closure(target: Tensor, parts: dict[str, Any]) -> Any:
    def inner(outputs: Tensor) -> Tensor:
        return (outputs - target).sum() * parts["weight"].sum()

    return lambda outputs: inner(outputs) * 1.0


def names(loss: Any) -> list[str]:
    return [name for name, _ in tensors_of(loss)]


def doubled(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor])


def test_they_are_found_in_closures_defaults_globals_and_partials() -> None:
    def with_default(outputs: Tensor, target: Tensor = SCALE) -> Tensor:
        return (outputs - target).sum()

    assert names(closure(torch.ones(3), {"weight": torch.ones(2)})) == ["parts", "target"]
    assert names(by_global) == ["SCALE"]
    assert names(with_default) == ["0"]
    assert names(functools.partial(by_argument, target=SCALE, weight=SCALE)) == ["target", "weight"]
    assert names(torch.nn.functional.mse_loss) == []
    assert names(None) == []


def test_another_function_has_them_changed_and_the_given_one_stays() -> None:
    loss = closure(torch.ones(3), {"weight": torch.ones(2)})
    other = with_tensors(loss, doubled)
    assert float(loss(torch.zeros(3))) == -3 * 2
    assert float(other(torch.zeros(6))) == -6 * 4
    assert float(loss(torch.zeros(3))) == -3 * 2
    assert with_tensors(by_global, doubled)(torch.ones(6)) == 6
    assert by_global(torch.ones(3)) == 3
    partial = functools.partial(by_argument, target=SCALE, weight=SCALE)
    assert with_tensors(partial, doubled)(torch.zeros(6)) == -6


def test_what_is_no_function_is_handed_back() -> None:
    criterion = torch.nn.MSELoss()
    assert with_tensors(criterion, doubled) is criterion
    assert with_tensors("sum", doubled) == "sum"
