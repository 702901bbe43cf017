"""``requires_grad`` and ``.grad`` for the time of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


def set_flags(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], trained: set[str], later: Callable[..., object]
) -> int:
    """Let the trained parameters, and no others, require grad.

    A frozen parameter must not have a gradient either: an optimizer that owns it (by ``zero_grad(set_to_none=False)``,
    momentum, weight decay) would go on moving it. So it is set aside.

    Args:
        later: ``later(function, *args)`` calls it when the run ends: flags and gradients are then what they were, also
            of a parameter that has taken a parameter's place since (``load_state_dict(assign=True)``).

    Returns:
        Bytes of the gradients that were set aside.
    """
    set_aside = 0
    for name, parameter in parameters.items():
        later(_restore, model, name, parameter, parameter.requires_grad)
        if name in trained:
            _require(parameter, True)
            continue
        later(_give_back, parameter, parameter.grad)
        if parameter.grad is not None:
            set_aside += parameter.grad.numel() * parameter.grad.element_size()
            parameter.grad = None
        _require(parameter, False)
    return set_aside


def standing(model: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
    """The parameter that has this name now; ``parameter`` itself where none has."""
    try:
        return model.get_parameter(name)
    except AttributeError:
        return parameter


def _restore(model: nn.Module, name: str, parameter: nn.Parameter, flag: bool) -> None:
    for each in {id(p): p for p in (parameter, standing(model, name, parameter))}.values():
        _require(each, flag)


def _require(parameter: nn.Parameter, flag: bool) -> None:
    with torch.inference_mode(parameter.is_inference()):  # (else a flag of what was made there cannot be set again)
        parameter.requires_grad_(flag)


def _give_back(parameter: nn.Parameter, gradient: Tensor | None) -> None:
    if gradient is not None:  # the model may have been moved, cast or resized meanwhile
        gradient = gradient.to(device=parameter.device, dtype=parameter.dtype)
    parameter.grad = gradient if gradient is None or gradient.shape == parameter.shape else None
