"""What is to be run: which parameters train, by which method, under which optimizer; and where the model comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from frostline.costing.cost import check_method
from frostline.subsets import Subset


@dataclass(frozen=True)
class Case:
    """One configuration of a model's training loop.

    Attributes:
        names: the parameters that train, by name. Of a slice the whole tensor is run, as eager torch does.
        method: one of ``frostline.costing.cost.RUN_METHODS``.
        optimizer: a class of ``torch.optim`` by name, in any case.
    """

    names: tuple[str, ...]
    method: str = "freeze"
    optimizer: str = "adamw"

    def __post_init__(self) -> None:
        check_method(self.method, runs=True)

    @classmethod
    def of(cls, subset: Subset | Sequence[str], method: str = "freeze", optimizer: str = "adamw") -> Case:
        """The case of a subset, or of parameter names."""
        return cls(tuple(subset), method, optimizer)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the pipe; ``from_dict`` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Case:
        return cls(tuple(data["names"]), data["method"], data["optimizer"])


@dataclass(frozen=True)
class Source:
    """Where a worker gets its model, inputs and loss.

    Attributes:
        target: a TARGET of the command line (``file.py:name`` ...); ``inputs``, ``model_class`` and ``loss`` as there.
        file: instead of a target, a file written by `frostline.measuring.pickled`.
        eval_mode: run in eval mode, or in train mode; None leaves every module's mode as it is found.
        device: where to run; None leaves the model where it is.
        seed: set before the model is built, so that every process has the same weights.
    """

    target: str = ""
    inputs: tuple[str, ...] = ()
    model_class: str | None = None
    loss: str | None = None
    file: str = ""
    eval_mode: bool | None = None
    device: str | None = None
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the pipe; ``from_dict`` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Source:
        return cls(**{**data, "inputs": tuple(data["inputs"])})
