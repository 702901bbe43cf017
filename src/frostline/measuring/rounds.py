"""Running many cases side by side: every round gives each of them a turn, so that a drift of the machine meets all."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from frostline.measuring.case import Case, Source
from frostline.measuring.host import Worker, WorkerError
from frostline.measuring.measured import Measured, Outcome
from frostline.measuring.timing import turn_size
from frostline.probing.timings import Reference

WARM_UP = 3
"""Steps before the first that counts: the optimizer makes its state in the first, allocators settle in the second."""
BUDGET_SECONDS = 60.0
MOST_ROUNDS, FEWEST_ROUNDS = 25, 5

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and of how much."""


def measure_cases(
    source: Source | Sequence[Source],
    cases: Sequence[Case],
    *,
    rounds: int | None = None,
    threads: int | None = None,
    together: bool = False,
    examine: bool = True,
    warm_up: int = WARM_UP,
    reference: Reference | None = None,
    progress: Progress | None = None,
) -> list[Outcome]:
    """Run every case, and say what it took, in the order given.

    Args:
        source: where the model comes from; or one for each case.
        rounds: turns of each case; None for as many as fit in a minute or so, from 5 to 25.
        threads: of torch's operators in every process; None leaves torch's choice.
        together: one process hosts all cases of a source, set up and warmed up anew for each turn; otherwise each has
            a process of its own, all of them up at the same time (and each with its own copy of the model).
        examine: also find FLOPs, saved bytes and peak memory, in steps of their own.
        warm_up: steps after a case is set up, before the clock starts; at least 2.
        reference: looked at before and after each turn, in this process, while all others wait.

    A case that raises, or whose process dies, has an outcome with its error; the others go on. When this function
    returns or raises, Ctrl-C included, no process of it is left.
    """
    if not cases:
        return []
    say = progress or _silent
    with ExitStack() as stack:
        sources = [source] * len(cases) if isinstance(source, Source) else list(source)
        if together:
            shared = {each: _Host(each, threads, stack, shared=True) for each in dict.fromkeys(sources)}
            hosts = [shared[each] for each in sources]
        else:
            hosts = [_Host(each, threads, stack, shared=False) for each in sources]
        seats = [_Seat(case, host, max(2, warm_up)) for case, host in zip(cases, hosts, strict=True)]
        for done, seat in enumerate(seats):
            say("warming up", done, len(seats))
            seat.begin(examine)
        if rounds is None:
            rounds = _affordable([seat for seat in seats if not seat.error])
        for number in range(rounds):
            there_and_back = seats if number % 2 == 0 else seats[::-1]
            for done, seat in enumerate(there_and_back):
                say("running", number * len(seats) + done, rounds * len(seats))
                seat.take_turn(reference)
        return [seat.outcome() for seat in seats]


def _silent(what: str, done: int, total: int) -> None:
    pass


class _Host:
    """A worker process and the case it is set up for; started again if it died on an earlier case."""

    def __init__(self, source: Source, threads: int | None, stack: ExitStack, shared: bool) -> None:
        self._source = source
        self._threads = threads
        self._stack = stack
        self._worker: Worker | None = self._start()  # loads while the others start
        self._loaded = False
        self._cannot_load: WorkerError | None = None
        self._shared = shared
        self.arranged: _Seat | None = None

    def _start(self) -> Worker:
        return self._stack.enter_context(Worker(self._source, self._threads))

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Ask the worker, which is started if it has to be.

        Raises:
            WorkerError: it raised, or died. What cannot be loaded is not tried again.
        """
        if self._cannot_load is not None:
            raise self._cannot_load
        if self._worker is None:
            self._worker, self._loaded = self._start(), False
        try:
            if not self._loaded:
                self._worker.receive()
                self._loaded = True
            return self._worker.ask(what, **arguments)
        except WorkerError as error:
            self.arranged = None
            if not self._loaded:
                self._cannot_load = error
            if not (error.alive and self._loaded and self._shared):
                self._worker.stop()
                self._worker = None
            raise


class _Seat:
    """One case while it is measured."""

    def __init__(self, case: Case, host: _Host, warm_up: int) -> None:
        self.case = case
        self.host = host
        self.warm_up = warm_up
        self.error = self.detail = ""
        self.step_seconds = 0.0
        self.examined: dict[str, Any] | None = None
        self.turns: list[dict[str, float]] = []

    def begin(self, examine: bool) -> None:
        """Set it up, warm it up and look at it."""
        try:
            self._arrange()
            if examine:
                self.examined = self.host.ask("examine")
        except WorkerError as error:
            self._fail(error)

    def take_turn(self, reference: Reference | None) -> None:
        if self.error:
            return
        looks = []
        try:
            self._arrange()
            settling, steps = turn_size(self.step_seconds)
            looks += _looks(reference)
            turn = self.host.ask("turn", settling=settling, steps=steps)
            looks += _looks(reference)
            self.turns.append({**turn, "reference": statistics.mean(looks)} if looks else turn)
        except WorkerError as error:
            self._fail(error)

    def outcome(self) -> Outcome:
        if self.error or not self.turns:
            return Outcome(self.case, None, self.error or "no round was run", self.detail)
        return Outcome(self.case, Measured.of(self.turns, self.examined))

    def _arrange(self) -> None:
        if self.host.arranged is not self:
            taken = self.host.ask("arrange", case=self.case.to_dict(), warm_up=self.warm_up)
            self.step_seconds = self.step_seconds or taken["step_seconds"]
            self.host.arranged = self

    def _fail(self, error: WorkerError) -> None:
        self.error, self.detail = str(error), error.detail


def _looks(reference: Reference | None) -> list[float]:
    return [] if reference is None else [reference.look(always=True)]


def _affordable(seats: Sequence[_Seat]) -> int:
    """Rounds that fit in the budget."""
    round_seconds = sum(seat.step_seconds * sum(turn_size(seat.step_seconds)) for seat in seats)
    return max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(BUDGET_SECONDS / max(round_seconds, 1e-9))))
