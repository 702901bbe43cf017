"""What one step is: a model, what it is given, and how a loss comes out."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from frostline.errors import TraceError

Loss = Callable[[Any], Tensor]


def split_inputs(inputs: Any, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``inputs`` as positional and keyword arguments: a tensor, a tuple (positional) or a mapping (keywords)."""
    if inputs is None:
        return tuple(args or ()), dict(kwargs or {})
    if args is not None or kwargs is not None:
        raise TraceError("give either inputs or args/kwargs, not both")
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)) and not hasattr(inputs, "_fields"):
        return tuple(inputs), {}
    return (inputs,), {}


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with every tensor in it changed, through tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(v, change) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(v, change) for v in value)
    if isinstance(value, Mapping):
        return {k: map_tensors(v, change) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: map_tensors(getattr(value, f.name), change) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **fields)
    return value


def default_loss(outputs: Any) -> Tensor:
    """``outputs.loss``, ``outputs["loss"]``, or the outputs themselves if they are a scalar."""
    if isinstance(outputs, Tensor):
        if outputs.numel() == 1 and outputs.dim() <= 1:
            return outputs.reshape(()) if outputs.dim() else outputs
        raise TraceError(
            f"the model returned a tensor of shape {tuple(outputs.shape)}, not a scalar loss: pass "
            'loss=lambda outputs: ..., or loss="sum" to cost the sum of the outputs (figures are then `assumed`)'
        )
    loss = getattr(outputs, "loss", None)
    if loss is None and isinstance(outputs, Mapping):
        loss = outputs.get("loss")
    if isinstance(loss, Tensor):
        return loss
    raise TraceError(
        f"the model returned {type(outputs).__name__} without a loss: pass loss=lambda outputs: ..., give it labels, "
        'or loss="sum" to cost the sum of the outputs (figures are then `assumed`)'
    )


def sum_loss(outputs: Any) -> Tensor:
    """The sum of every floating-point tensor in the outputs: a stand-in for a loss that is not known."""
    if isinstance(outputs, Tensor):
        found = [outputs]
    else:
        values = outputs.values() if isinstance(outputs, Mapping) else outputs
        found = [v for v in values if isinstance(v, Tensor)] if isinstance(values, (list, tuple)) or values else []
    floating = [t.float().sum() for t in found if t.is_floating_point()]
    if not floating:
        raise TraceError('loss="sum" found no floating-point tensor among the outputs')
    return torch.stack(floating).sum() if len(floating) > 1 else floating[0]


def wants_labels(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the model computes its own loss from labels (as Hugging Face models do) and was given none."""
    parameters = list(inspect.signature(model.forward).parameters)
    name = next((label for label in ("labels", "start_positions") if label in parameters), None)
    if name is None or not hasattr(model, "config") or kwargs.get(name) is not None:
        return False
    return len(args) <= parameters.index(name)


def made_up_labels(model: nn.Module, kwargs: dict[str, Any], args: tuple[Any, ...], outputs: Any) -> dict[str, Tensor]:
    """Labels of the right shape and kind for the outputs a run without labels gave (None: it needs labels to run)."""
    config: Any = getattr(model, "config", None)
    first = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
    if outputs is None or getattr(outputs, "logits", None) is None:
        starts = getattr(outputs, "start_logits", None)
        if starts is not None:
            zeros = torch.zeros(starts.shape[0], dtype=torch.int64)
            return {"start_positions": zeros, "end_positions": zeros.clone()}
        first = kwargs.get("decoder_input_ids", first)
        if first is None or first.is_floating_point():
            raise TraceError("no labels could be made up for these inputs: pass labels, or loss=")
        return {"labels": torch.zeros(first.shape, dtype=torch.int64)}
    logits = outputs.logits
    shape, device = tuple(logits.shape), None
    problem = getattr(config, "problem_type", None)
    num_labels = getattr(config, "num_labels", None)
    if len(shape) == 2 and (problem == "regression" or (problem is None and num_labels == 1)):
        return {"labels": torch.zeros(shape[0] if shape[1] == 1 else shape, device=device)}
    if len(shape) == 2 and problem == "multi_label_classification":
        return {"labels": torch.zeros(shape, device=device)}
    if len(shape) == 4:  # (batch, classes, height, width): per pixel
        size = next(
            (v.shape[-2:] for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() == 4), shape[2:]
        )
        return {"labels": torch.zeros((shape[0], *size), dtype=torch.int64)}
    if first is not None and not first.is_floating_point() and len(shape) == 3 and first.dim() == 2:
        return {"labels": torch.zeros(first.shape, dtype=torch.int64)}
    return {"labels": torch.zeros(shape[:-1], dtype=torch.int64)}
