"""``requires_grad`` and ``.grad`` for the time of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn


def set_flags(parameters: Mapping[str, nn.Parameter], trained: set[str], later: Callable[..., object]) -> int:
    """Let the trained parameters, and no others, require grad.

    A frozen parameter must not have a gradient either: an optimizer that owns it (by ``zero_grad(set_to_none=False)``,
    momentum, weight decay) would go on moving it. So it is set aside.

    Args:
        later: ``later(function, *args)`` calls it when the run ends: flags and gradients are then what they were.

    Returns:
        Bytes of the gradients that were set aside.
    """
    set_aside = 0
    for name, parameter in parameters.items():
        later(parameter.requires_grad_, parameter.requires_grad)
        if name in trained:
            parameter.requires_grad_(True)
            continue
        later(_give_back, parameter, parameter.grad)
        if parameter.grad is not None:
            set_aside += parameter.grad.numel() * parameter.grad.element_size()
            parameter.grad = None
        parameter.requires_grad_(False)
    return set_aside


def _give_back(parameter: nn.Parameter, gradient: Tensor | None) -> None:
    if gradient is not None:  # the model may have been moved, or cast, meanwhile
        gradient = gradient.to(device=parameter.device, dtype=parameter.dtype)
    parameter.grad = gradient
