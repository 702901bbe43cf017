"""Finished runs, one JSON line each, so that an interrupted study goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Finished:
    """One run of one row.

    Attributes:
        setting: what else decides the outcome (epochs, number of examples ...): runs of another are not mixed in.
        validation: the last of ``validated``, which rates are chosen by.
        scores: on held-out examples.
        measured_seconds, predicted_seconds: of all ``steps``; ``share``: predicted, of full training's.
        names: what trained.
        losses: the mean training loss of each epoch.
        looked, training, validated: epochs, and the scores of training and validation examples after them.
    """

    study: str
    setting: str
    row: str
    rate: float
    seed: int
    validation: float
    scores: dict[str, float]
    measured_seconds: float
    predicted_seconds: float
    share: float
    steps: int
    trained: int
    names: list[str]
    losses: list[float] = field(default_factory=list)
    looked: list[int] = field(default_factory=list)
    training: list[float] = field(default_factory=list)
    validated: list[float] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str, float, int]:
        return self.study, self.setting, self.row, self.rate, self.seed


class Results:
    """The runs in a file. One that is added is on disk when `add` returns.

    Attributes:
        clocked: row -> seconds of a step of the first seed, measured side by side and predicted; in a second file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._clock_path = path.with_suffix(".seconds.json")
        self.clocked: dict[str, tuple[float, float]] = (
            json.loads(self._clock_path.read_text(encoding="utf-8")) if self._clock_path.exists() else {}
        )
        self._runs = {run.key: run for run in _read(path)}

    def add(self, run: Finished) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(run)) + "\n")
        self._runs[run.key] = run

    def clock(self, seconds: dict[str, tuple[float, float]]) -> None:
        """Keep seconds of a step by row: measured and predicted."""
        self.clocked |= seconds
        self._clock_path.write_text(json.dumps(self.clocked, indent=1) + "\n", encoding="utf-8")

    def get(self, study: str, setting: str, row: str, rate: float, seed: int) -> Finished | None:
        return self._runs.get((study, setting, row, rate, seed))

    def of(self, study: str, setting: str, row: str) -> list[Finished]:
        """All runs of a row."""
        return [run for run in self._runs.values() if run.key[:3] == (study, setting, row)]


def _read(path: Path) -> Iterator[Finished]:
    """What was finished; a last line that was cut off while it was written is taken off the file."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    whole, _, torn = text.rpartition("\n")
    if torn:
        path.write_text(whole + "\n" if whole else "", encoding="utf-8")
    for line in whole.splitlines():
        data: dict[str, Any] = json.loads(line)
        yield Finished(**data)


def best_rate(runs: list[Finished], seed: int) -> float:
    """The learning rate with the best validation score; of equal ones the smallest."""
    tried = [run for run in runs if run.seed == seed]
    return min(tried, key=lambda run: (-run.validation, run.rate)).rate
