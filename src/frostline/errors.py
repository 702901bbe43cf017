"""Every error of frostline's that a caller can cause. ``assert`` is for what only a bug of ours can break."""

from __future__ import annotations

from typing import Any

__all__ = [
    "AuditError",
    "FitError",
    "FrostlineError",
    "FrostlineWarning",
    "ImportanceError",
    "OptimizerError",
    "PlanError",
    "RunError",
    "SubsetError",
    "TargetError",
    "TraceError",
    "UncountedOpError",
]


class FrostlineError(Exception):
    """Base of every error that a caller can cause: catch this one to catch them all."""


class SubsetError(FrostlineError):
    """``train=`` names nothing, names what is not in the model, or names what cannot train."""


class TraceError(FrostlineError):
    """The model, its inputs or its loss could not be run and recorded."""


class OptimizerError(FrostlineError):
    """``optimizer=`` is not known, or its state cannot be counted."""


class TargetError(FrostlineError):
    """The command line's TARGET could not be loaded, or does not give a model."""


class FitError(FrostlineError):
    """Nothing fits into the memory, or it cannot be told which dimension of the inputs is the batch."""


class PlanError(FrostlineError):
    """No subset meets the budget, or what is planned for cannot be read."""


class ImportanceError(FrostlineError):
    """Importance cannot be measured, or what was read is none."""


class UncountedOpError(FrostlineError):
    """An op has no count, so that a total would be too low."""


class RunError(FrostlineError):
    """A train-only run cannot begin, or is used after its end."""


class AuditError(RunError):
    """A step did more than its plan, and the audit was strict. ``audit`` holds what was found."""

    def __init__(self, message: str, audit: Any = None) -> None:
        super().__init__(message)
        self.audit = audit


class FrostlineWarning(UserWarning):
    """Something is done otherwise than asked, and goes on."""
