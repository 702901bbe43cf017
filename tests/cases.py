"""The model zoo: small real architectures, each with inputs and a loss, built alike every time.

``CASES[name]()`` returns a fresh :class:`Case`. The models live in ``tests/zoo``, one kind a file; a builder is any
function there under ``@case``. Nothing outside torch is imported until a case that needs it is built.
"""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

SEED = 0
DEVICE = os.environ.get("FROSTLINE_TEST_DEVICE", "cpu")
"""Where cases run. Of another device than the CPU, those whose code makes its tensors on the CPU are missing."""
if DEVICE != "cpu":
    torch.backends.cudnn.deterministic = True


@dataclass
class Case:
    """A model and one step of it.

    Args:
        model: in the train or eval mode it is to run in, its flags as its author would leave them.
        inputs: a tensor, a tuple of positional arguments or a mapping of keyword arguments.
        loss: outputs -> scalar; None takes ``outputs.loss``, or the outputs themselves if they are a scalar.
        step: model -> scalar, in place of ``inputs`` and ``loss``.
    """

    model: nn.Module
    inputs: Any = ()
    loss: Callable[[Any], Tensor] | None = None
    step: Callable[[nn.Module], Tensor] | None = None
    name: str = ""
    rebuild: Callable[[], Case] | None = field(default=None, repr=False)

    def run(self) -> Tensor:
        """Run the forward and the loss once, dropout and the like drawn alike each time."""
        torch.manual_seed(SEED + 1)
        if self.step is not None:
            return self.step(self.model)
        if isinstance(self.inputs, Mapping):
            outputs = self.model(**self.inputs)
        elif isinstance(self.inputs, tuple):
            outputs = self.model(*self.inputs)
        else:
            outputs = self.model(self.inputs)
        if self.loss is not None:
            return self.loss(outputs)
        loss = getattr(outputs, "loss", None)
        return outputs if loss is None else loss

    def fresh(self) -> Case:
        """The same case again, sharing no tensor with this one."""
        if self.rebuild is None:
            raise ValueError(f"case {self.name!r} cannot be built again: give it rebuild=, or register it with @case")
        return self.rebuild()


@dataclass(frozen=True)
class CaseBuilder:
    """Builds one case under a fixed seed; says what it needs.

    Args:
        needs: the library it imports, or None.
        data_decides: the forward reads values (``nonzero``, ``.item()``), so no fake tensor can run it.
    """

    name: str
    build: Callable[[], Case]
    needs: str | None = None
    data_decides: bool = False

    @property
    def missing(self) -> str:
        """What is in the way of running it; '' if nothing is."""
        if self.needs is not None and importlib.util.find_spec(self.needs) is None:
            return f"needs {self.needs}"
        if DEVICE != "cpu":
            try:
                loss = self().run()
                if loss.requires_grad:
                    loss.backward()
            except Exception as error:
                return f"not written for {DEVICE}: {error}"
        return ""

    def __call__(self) -> Case:
        torch.manual_seed(SEED)
        built = self.build()
        if DEVICE != "cpu":
            _move(built)
        built.name = self.name
        built.rebuild = self
        return built


def _move(case: Case) -> None:
    """To `DEVICE`: the model, the inputs, and what the loss or the step makes."""
    case.model.to(DEVICE)
    case.inputs = tree_map(_moved, case.inputs)
    case.loss = case.loss and _there(case.loss)
    case.step = case.step and _there(case.step)


def _moved(value: Any) -> Any:
    return value.detach().to(DEVICE).requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _there(function: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    def run(given: Any) -> Tensor:
        with torch.device(DEVICE):
            return function(given)

    return run


CASES: dict[str, CaseBuilder] = {}
"""Every case by name."""

Build = TypeVar("Build", bound=Callable[[], Case])


def case(*, needs: str | None = None, data_decides: bool = False) -> Callable[[Build], Build]:
    """Register a builder under its function's name."""

    def register(build: Build) -> Build:
        assert build.__name__ not in CASES, f"two cases are named {build.__name__}"
        CASES[build.__name__] = CaseBuilder(build.__name__, build, needs, data_decides)
        return build

    return register


def build(make: Callable[[], Case], name: str = "unnamed") -> Case:
    """A case that is in no registry: ``make`` builds it, and builds it again when asked."""
    return CaseBuilder(name, make)()


def trainable_names(model: nn.Module) -> list[str]:
    """The parameters that could train: floating-point and complex ones, each tied one under its first name."""
    return [name for name, p in model.named_parameters() if p.is_floating_point() or p.is_complex()]


def subsets_for(case: Case, seed: int = 0) -> dict[str, list[str]]:
    """Subsets worth testing, at least 12 where the model has parameters enough; none twice.

    Which parameters each takes depends on names and shapes alone, so that two runs agree.
    """
    model = case.model
    names = trainable_names(model)
    rng = random.Random(f"{case.name}-{seed}")
    norm_modules = tuple(
        path for path, module in model.named_modules() if "norm" in type(module).__name__.lower() and path
    )
    wanted: dict[str, list[str]] = {
        "all": names,
        "first": names[:1],
        "last": names[-1:],
        "last 2": names[-2:],
        "last quarter": names[-max(1, len(names) // 4) :],
        "middle": names[len(names) // 2 : len(names) // 2 + 1],
        "biases": [n for n in names if n.rpartition(".")[2].startswith("bias")],
        "norms": [n for n in names if any(n.startswith(path + ".") for path in norm_modules)],
        "matrices": [n for n in names if model.get_parameter(n).dim() > 1],
        "first and last": sorted({*names[:1], *names[-1:]}, key=names.index),
        "all but first": names[1:],
        "alternate": names[::2],
    }
    for share in (0.1, 0.25, 0.5, 0.75):
        count = max(1, round(share * len(names)))
        wanted[f"random {share}"] = sorted(rng.sample(names, count), key=names.index)
    for name in sorted(rng.sample(names, min(len(names), 8)), key=names.index):
        wanted[f"only {name}"] = [name]
    chosen: dict[str, list[str]] = {}
    seen: set[frozenset[str]] = set()
    for label, subset in wanted.items():
        if subset and frozenset(subset) not in seen:
            seen.add(frozenset(subset))
            chosen[label] = list(subset)
    return chosen


from tests.zoo import (  # noqa: E402  the builders register themselves, so `case` must exist first
    attention,
    checkpoints,
    control,
    convolution,
    dense,
    functions,
    libraries,
    precision,
    recurrent,
    writes,
)

__all__ = ["CASES", "Case", "CaseBuilder", "build", "case", "subsets_for", "trainable_names"]
_ = (attention, checkpoints, control, convolution, dense, functions, libraries, precision, recurrent, writes)
