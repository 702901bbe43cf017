"""The other end of a worker: starting it, asking it, and making sure that it ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from types import TracebackType
from typing import Any

from frostline.errors import FrostlineError
from frostline.measuring.case import Source


class WorkerError(FrostlineError):
    """A worker raised, or died. ``alive`` says which; ``detail`` is its traceback or the end of what it printed."""

    def __init__(self, message: str, alive: bool, detail: str = "") -> None:
        super().__init__(message)
        self.alive = alive
        self.detail = detail


class Worker:
    """One worker process; a context manager at whose end it is gone, with all that it started.

    ``send`` and ``receive`` are apart so that several workers can load at the same time; ``ask`` is both.

    Args:
        source: what it will load.
        threads: of torch's operators; None leaves torch's choice.
    """

    def __init__(self, source: Source, threads: int | None) -> None:
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115  closed in `stop`
        environment = dict(os.environ, KINETO_LOG_LEVEL="99")
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "frostline.measuring.worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._printed, env=environment,
                start_new_session=True,  # a process group of its own: Ctrl-C reaches us alone, and we end the group
                encoding="utf-8",
            )  # fmt: skip
        except BaseException:
            self._printed.close()
            raise
        self.send("load", source=source.to_dict(), path=sys.path, threads=threads)

    @property
    def process_id(self) -> int:
        return self._process.pid

    def send(self, what: str, **arguments: Any) -> None:
        """Ask without waiting for the answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `receive` says what it died of
            self._process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """The answer to the oldest question that has none yet.

        Raises:
            WorkerError: the question raised there, or the process died.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            raise WorkerError(self._death(), alive=False, detail=self._tail())
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            error = found["error"]
            notes = "".join(f" ({note.removeprefix('frostline: ')})" for note in error["notes"])
            raise WorkerError(f"{error['type']}: {error['message']}{notes}", alive=True, detail=error["traceback"])
        answer: dict[str, Any] = found["answer"]
        return answer

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        self.send(what, **arguments)
        return self.receive()

    def stop(self) -> None:
        """End the process and what it started. It is idle or stuck, and has nothing to save: it is killed."""
        if os.name == "posix" and self._process.returncode is None:  # not reaped: the number is still this group's
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()
        self._printed.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.stop()

    def _death(self) -> str:
        if hasattr(os, "waitid"):  # leaves it to be reaped by `stop`, which then still knows the group
            found = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
            assert found is not None
            code = found.si_status if found.si_code == os.CLD_EXITED else -found.si_status
        else:
            code = self._process.wait()
        if code == -signal.SIGKILL:
            return "its process was killed (signal 9), as Linux does when memory runs out"
        if code < 0:
            return f"its process died of {signal.Signals(-code).name}"
        return f"its process ended by itself (exit code {code})"

    def _tail(self, size: int = 4000) -> str:
        """The end of what the process printed."""
        length = self._printed.seek(0, os.SEEK_END)
        self._printed.seek(max(0, length - size))
        return self._printed.read().decode(errors="replace")
