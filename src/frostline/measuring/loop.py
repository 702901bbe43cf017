"""One step of a usual training loop, arranged by a method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from frostline.costing.engine import FROZEN
from frostline.costing.optimizers import known
from frostline.errors import FrostlineError, OptimizerError
from frostline.measuring.case import Case
from frostline.running.train_only import Run, train_only
from frostline.tracing.step import Loss, default_loss, made_up_labels, split_inputs, sum_loss, wants_labels

PHASES = ("forward", "backward", "optimizer")
"""The parts of a step, in order: up to the loss, the gradients, and the optimizer with ``zero_grad``."""

Mark = Callable[[str, Tensor], None]
"""Called with a phase's name, and the loss, when the phase ends."""


class Loop:
    """A model with its inputs and loss, and the case it is set up for.

    `arrange` sets the flags and makes the optimizer of a case; `step` then runs one step of it. The learning rate is
    0, so that the weights and with them every step's work stay as they are.

    Raises:
        FrostlineError: the model is on ``meta``, or its loss is none.
    """

    def __init__(self, model: nn.Module, inputs: Any, loss: Loss | str | None) -> None:
        self.model = model
        self.args, self.kwargs = split_inputs(inputs, None, None)
        self.take_loss: Loss
        if loss is None:
            self.take_loss = default_loss
        elif loss == "sum":
            self.take_loss = sum_loss
        elif callable(loss):
            self.take_loss = loss
        else:
            raise FrostlineError(f'loss must be callable(outputs) -> scalar, or "sum"; got {loss!r}')
        self.parameters = dict(model.named_parameters())
        weightless = [name for name, p in self.parameters.items() if p.is_meta]
        if weightless:
            raise FrostlineError(
                f"{weightless[0]!r} is on meta: a step can only be run with weights. Let the TARGET build them."
            )
        if loss is None and wants_labels(model, self.args, self.kwargs):
            self.kwargs.update(self._labels())
        self.trained: list[nn.Parameter] = []
        self.method = ""
        self._run: Run | None = None
        self.optimizer: torch.optim.Optimizer

    def _labels(self) -> dict[str, Tensor]:
        """Labels for a model that computes its own loss: shaped like what a run without labels returns."""
        outputs = None
        try:
            with torch.no_grad():
                outputs = self.model(*self.args, **self.kwargs)
        except Exception:  # it may need labels to run at all; the first step will say what is wrong
            pass
        device = next(iter(self.parameters.values())).device
        made = made_up_labels(self.model, self.kwargs, self.args, outputs)
        return {name: label.to(device) for name, label in made.items()}

    def arrange(self, case: Case) -> None:
        """Set the flags of a case and make its optimizer; gradients and states of the case before are let go.

        Raises:
            FrostlineError: a parameter is not in the model.
            OptimizerError: the optimizer is not known, or refuses the parameters.
        """
        missing = [name for name in case.names if name not in self.parameters]
        if missing:
            raise FrostlineError(f"{type(self.model).__name__} has no parameter {missing[0]!r}")
        self.trained = [self.parameters[name] for name in case.names]
        self.method = case.method
        self.close()
        chosen = {id(p) for p in self.trained}
        for parameter in self.parameters.values():
            parameter.grad = None
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(case.method not in FROZEN or id(parameter) in chosen)
        if case.method == "train-only":
            self._run = train_only(self.model, list(case.names))
        if hasattr(self, "optimizer"):
            del self.optimizer
        self.optimizer = _optimizer(case.optimizer, self.trained)

    def close(self) -> None:
        """End the run of a ``train-only`` case; other flags stay as they are."""
        if self._run is not None:
            self._run.close()
            self._run = None

    def step(self, mark: Mark) -> None:
        """Run one step. Outputs are let go when the loss returns; ``.grad`` of what no optimizer owns piles up."""
        loss = self.take_loss(self.model(*self.args, **self.kwargs))
        mark("forward", loss)
        loss.backward(inputs=self.trained if self.method == "backward-inputs" else None)
        mark("backward", loss)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        mark("optimizer", loss)


def _optimizer(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    classes = known()
    if name.lower() not in classes:
        raise OptimizerError(f"no optimizer {name!r} in torch.optim; there is {', '.join(sorted(classes))}")
    try:
        return classes[name.lower()](parameters, lr=0.0)  # type: ignore[call-arg]
    except Exception as error:
        raise OptimizerError(f"{name} refuses these parameters: {error}") from error
