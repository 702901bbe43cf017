"""Backward over one batch after the other, each gradient reduced the moment it is whole; then everything put back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from frostline.subsets.names import listed
from frostline.tracing.environment import preserved, rng_state, set_rng_state


class Gradients:
    """A model all of whose parameters require grad, until the ``with`` block ends.

    Args:
        reduce: ``(name, gradient) -> scalar``, called once for each gradient.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], reduce: Callable[[str, Tensor], Tensor]
    ) -> None:
        self.model = model
        self.parameters = parameters
        self.reduce = reduce
        self.notes: list[str] = []
        self._found: dict[str, Tensor] = {}
        self._parted: set[str] = set()  # parameters whose gradient comes in parts
        self._undo = ExitStack()

    def __enter__(self) -> Gradients:
        with ExitStack() as undo:
            undo.enter_context(preserved(self.model))
            self._values = _written(self.model)
            undo.callback(_give_values_back, self._values)
            for name, parameter in self.parameters.items():
                self._prepare(name, parameter, undo)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def _prepare(self, name: str, parameter: nn.Parameter, undo: ExitStack) -> None:
        undo.callback(parameter.requires_grad_, parameter.requires_grad)
        undo.callback(_set_grad, parameter, parameter.grad)
        parameter.grad = None
        parameter.requires_grad_(True)
        hooks: Any = parameter._post_accumulate_grad_hooks
        if hooks:
            undo.callback(hooks.update, dict(hooks))  # the same mapping: handles that users hold refer to it
            hooks.clear()
        elif hooks is None:
            undo.callback(setattr, parameter, "_post_accumulate_grad_hooks", None)

        def ready(parameter: Tensor) -> None:
            self._take(name, parameter)

        undo.callback(parameter.register_post_accumulate_grad_hook(ready).remove)

    def _take(self, name: str, parameter: Tensor) -> None:
        if name in self._found:
            self._parted.add(name)
        if name in self._parted:
            return  # it is reduced when backward has ended
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        with torch.no_grad():
            self._found[name] = self.reduce(name, gradient)

    def of(self, run: Callable[[], Tensor]) -> dict[str, float]:
        """Run one forward (``run`` returns the loss) and its backward; what each gradient came to, by name."""
        before = rng_state()
        parted = set(self._parted)
        found = self._once(run)
        if self._parted != parted:  # what was reduced of those was a part: the same again, with these kept
            set_rng_state(before)
            found = self._once(run)
            new = sorted(self._parted - parted)
            self.notes.append(f"gradients that come in parts were kept until backward had ended: {listed(new, 5)}")
        return found

    def _once(self, run: Callable[[], Tensor]) -> dict[str, float]:
        self._found = {}
        try:
            loss = run()
            with _foreign_kept(loss, self.parameters):
                loss.backward()
            del loss
            for name in self._parted:
                gradient = self.parameters[name].grad
                if gradient is not None:
                    with torch.no_grad():
                        self._found[name] = self.reduce(name, gradient)
            return {name: value.item() for name, value in self._found.items()}
        finally:
            self._found = {}
            for parameter in self.parameters.values():
                parameter.grad = None
            _give_values_back(self._values)


def _set_grad(parameter: Tensor, gradient: Tensor | None) -> None:
    parameter.grad = gradient


def _written(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Copies of what a forward may write to: buffers, and tensors that modules hold as plain attributes."""
    found = {
        id(value): value
        for module in model.modules()
        for value in (*module._buffers.values(), *module.__dict__.values())
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and value.layout == torch.strided
    }
    return [(tensor, tensor.detach().clone()) for tensor in found.values() if tensor.is_leaf]


def _give_values_back(values: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for tensor, copy in values:
            if tensor.device.type != "meta" and not torch.equal(tensor, copy):
                tensor.detach().copy_(copy)


class _foreign_kept:  # noqa: N801  used as a statement
    """``.grad`` of leaves that are no parameters of the model (an input, a loss's own weight) stays what it was."""

    def __init__(self, loss: Tensor, parameters: Mapping[str, nn.Parameter]) -> None:
        ours = {id(parameter) for parameter in parameters.values()}
        self.kept = [(leaf, leaf.grad) for leaf in _leaves(loss) if id(leaf) not in ours]

    def __enter__(self) -> None:
        for leaf, _ in self.kept:
            leaf.grad = None

    def __exit__(self, *exception: object) -> None:
        for leaf, gradient in self.kept:
            leaf.grad = gradient


def _leaves(loss: Tensor) -> list[Tensor]:
    """The leaves that backward from ``loss`` would accumulate into."""
    if loss.grad_fn is None:
        return [loss]
    leaves, seen, stack = [], {loss.grad_fn}, [loss.grad_fn]
    while stack:
        node = stack.pop()
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            leaves.append(variable)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return leaves
