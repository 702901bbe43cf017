"""Running a study: every row at every learning rate with the first seed, then at its best with the other seeds.

Finished runs are kept in a file of JSON lines; started again, a study goes on where it stopped. With ``--write`` the
table, plots and what they say are written into docs.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, track
from torch import nn

import frostline as fl
from examples.studies.layers import layers
from examples.studies.report import Table, table, write_page
from examples.studies.results import Finished, Results, best_rate
from examples.studies.rows import Costs, Row, UnavailableError, adapters, rows
from examples.studies.task import Task
from examples.studies.training import adapt

ROOT = Path(__file__).parents[2]
WARM_UP = 2  # steps of a turn that are not clocked


@dataclass
class Study:
    """A task, the rows to run, and where finished runs are kept.

    ``missing`` says, by label, why a row could not be run.
    """

    task: Task
    results: Results
    labels: Sequence[str]

    def __post_init__(self) -> None:
        self.missing: dict[str, str] = {}
        self.costs = Costs(self.task, self.task.fresh(self.task.settings.seeds[0]))
        self._lora_costs: Costs | None = None
        self._chosen: dict[tuple[str, int], list[str]] = {
            (run.row, run.seed): run.names
            for label in self.labels
            for run in self.results.of(self.task.name, self.setting, label)
        }

    @property
    def setting(self) -> str:
        """What decides the outcome of a run besides row, rate and seed."""
        threads = torch.get_num_threads()
        parts = (
            f"{self.task.num_examples} examples in batches of {self.task.batch_size}",
            f"{self.task.settings.epochs} epochs",
            f"{threads} thread{'s' * (threads > 1)}",
        )
        return ", ".join(parts)

    def run(self, console: Console) -> None:
        """Run what is not finished yet."""
        settings = self.task.settings
        first = settings.seeds[0]
        count = len(self.labels) * (len(settings.rates) + len(settings.seeds) - 1)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console) as progress:
            whole = progress.add_task(self.task.name, total=count)
            single = progress.add_task("")

            def advance(done: int, of: int) -> None:
                progress.update(single, completed=done, total=of)

            def one(row: Row, rate: float, seed: int) -> None:
                progress.update(single, description=f"{row.label}, rate {rate:g}, seed {seed}", completed=0, total=None)
                if self.results.get(self.task.name, self.setting, row.label, rate, seed) is None:
                    self.results.add(self._finish(row, rate, seed, advance))
                progress.advance(whole)

            for label in self.labels:
                row = rows(self.task)[label]
                try:
                    for rate in settings.rates:
                        one(row, rate, first)
                    best = best_rate(self.results.of(self.task.name, self.setting, label), first)
                    for seed in settings.seeds[1:]:
                        one(row, best, seed)
                except UnavailableError as error:
                    self.missing[label] = str(error)
                    console.print(f"left out: {label}, because {error}")

    def clock(self, console: Console, rounds: int = 2) -> None:
        """Take the seconds of a step of every row, turn by turn: runs that end up hours apart meet other conditions."""
        first = self.task.settings.seeds[0]
        labels = [label for label in self.labels if self.results.of(self.task.name, self.setting, label)]
        measured: dict[str, list[float]] = {label: [] for label in labels}
        predicted: dict[str, float] = {}
        for label in track(labels * rounds, "seconds, turn by turn", console=console):
            model, names, costs = self._prepare(rows(self.task)[label], first)
            predicted[label] = costs.seconds(names)
            trained = adapt(self.task, model, names, self.task.settings.rates[0], first, epochs=1)
            measured[label] += trained.step_seconds[WARM_UP:] or trained.step_seconds
        self.results.clock({label: (statistics.median(measured[label]), predicted[label]) for label in labels})

    def _prepare(self, row: Row, seed: int) -> tuple[nn.Module, list[str], Costs]:
        if row.choose is not None:
            if (row.label, seed) not in self._chosen:
                self._chosen[row.label, seed] = row.choose(self.costs, seed)
            return self.task.fresh(seed), self._chosen[row.label, seed], self.costs
        try:
            if self._lora_costs is None:
                self._lora_costs = Costs(self.task, self.task.lora(self.task.fresh(seed)))
            torch.manual_seed(seed)  # the adapters start from random numbers
            model = self.task.lora(self.task.fresh(seed))
        except ImportError as error:
            raise UnavailableError("peft is not installed") from error
        return model, adapters(model), self._lora_costs

    def _finish(self, row: Row, rate: float, seed: int, advance: Callable[[int, int], None]) -> Finished:
        model, names, costs = self._prepare(row, seed)
        seconds = costs.seconds(names)
        trained = adapt(
            self.task, model, names, rate, seed, epochs=self.task.settings.epochs,
            points=self.task.settings.points, progress=advance,
        )  # fmt: skip
        return Finished(
            study=self.task.name,
            setting=self.setting,
            row=row.label,
            rate=rate,
            seed=seed,
            validation=trained.validation[-1],
            scores={**self.task.scores(model), "training": trained.training[-1]},
            measured_seconds=trained.seconds,
            predicted_seconds=seconds * trained.steps,
            share=seconds / self.costs.full_seconds,
            steps=trained.steps,
            trained=sum(model.get_parameter(name).numel() for name in names),
            names=names,
            losses=trained.losses,
            looked=trained.looked,
            training=trained.training,
            validated=trained.validation,
            versions={
                "torch": str(torch.__version__),
                "frostline": fl.__version__,
                "python": platform.python_version(),
            },
        )

    def table(self) -> Table:
        """What is finished, a line a row."""
        return table(self.task, self.results, self.setting, list(rows(self.task)))


def main(task: Task, description: str | None, arguments: Sequence[str] | None = None) -> None:
    """The command line of a study."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, task)
    asked = parser.parse_args(arguments)
    run(task, asked)


def add_options(parser: argparse.ArgumentParser, task: Task) -> None:
    """The options that all studies have."""
    known = ", ".join(rows(task)).replace("%", "%%")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"those to run; by default all: {known}")
    parser.add_argument("--seeds", type=int, default=len(task.settings.seeds), help="how many (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=task.settings.epochs, help="(default: %(default)s)")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=task.settings.rates, help="learning rates to choose from"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch's operators (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / f"{task.name}_study.jsonl")
    parser.add_argument("--layers", action="store_true", help="show each layer of the first step, and run nothing")
    parser.add_argument("--clock", action="store_true", help="afterwards take every row's seconds again, turn by turn")
    parser.add_argument("--only-table", action="store_true", help="run nothing: show what is finished")
    parser.add_argument("--write", action="store_true", help="write docs/ with the table and the plots")


def run(task: Task, asked: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    console = Console()
    torch.set_num_threads(asked.threads)
    task.settings = replace(
        task.settings, epochs=asked.epochs, seeds=tuple(range(asked.seeds)), rates=tuple(asked.rates)
    )
    unknown = [label for label in asked.rows if label not in rows(task)]
    if unknown:
        raise SystemExit(f"no row is called {unknown[0]!r}; there are: {', '.join(rows(task))}")
    if asked.layers:
        console.print(layers(task))
        return
    study = Study(task, Results(asked.results), asked.rows or list(rows(task)))
    if not asked.only_table:
        study.run(console)
    if asked.clock:
        study.clock(console)
    found = study.table()
    console.print(found.rich())
    if asked.write:
        page = write_page(task, found, ROOT / "docs", study.missing)
        console.print(f"written: {page.relative_to(ROOT)}")
