"""What a step has in memory at one moment, by kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

KINDS = ("weights", "inputs", "gradients", "optimizer_state", "saved_activations", "transients", "scratch")


@dataclass(frozen=True)
class Moment:
    """The memory in use at one moment: while ``op`` runs, in ``module``, in the ``"forward"``, ``"backward"`` or
    ``"optimizer"`` part of the step. ``order``: which op of the forward, or which call's backward; -1 where not told.
    """

    phase: str
    op: str
    module: str
    by_kind: Mapping[str, int]
    order: int = field(default=-1, compare=False)

    @property
    def nbytes(self) -> int:
        return sum(self.by_kind.values())


@dataclass(frozen=True)
class Standing:
    """What is there all along.

    Attributes:
        weights: bytes of parameters and buffers.
        inputs: bytes of the step's arguments, and of what else it finds: labels of its loss.
        optimizer_state: bytes.
        kept: the gradients (parameter number -> bytes) that nobody clears between steps.
        gradient_bytes: per parameter: of its gradient.
        optimizer_scratch: what the optimizer's step takes on top.
    """

    weights: int
    inputs: int
    optimizer_state: int
    kept: Mapping[int, int]
    gradient_bytes: Sequence[int]
    optimizer_scratch: int

    def moment(
        self, phase: str, op: str, module: str, *, gradients: int = 0, saved: int = 0, transients: int = 0,
        scratch: int = 0, order: int = -1,
    ) -> Moment:  # fmt: skip
        """The moment at which this much is there besides."""
        amounts = (
            self.weights, self.inputs, sum(self.kept.values()) + gradients, self.optimizer_state, saved, transients,
            scratch,
        )  # fmt: skip
        return Moment(phase, op, module, dict(zip(KINDS, amounts, strict=True)), order)
