"""A script of the user's, run in this process as if it had been started by itself."""

from __future__ import annotations

import builtins
import importlib.machinery
import importlib.util
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType, TracebackType

from frostline.errors import TargetError

_WAKES: int | None = getattr(signal, "SIGRTMAX", None) or getattr(signal, "SIGUSR2", None)
"""A signal that few scripts use: it takes the main thread out of whatever it waits for."""


class Enough(BaseException):
    """Ends a script of which enough was seen. No ``except Exception`` catches it."""


@dataclass(frozen=True)
class Ended:
    """How a script ended.

    Attributes:
        code: the exit code that Python would have given.
        how: ``"end"``, ``"exit"`` (``sys.exit``), ``"error"``, ``"interrupt"`` or ``"enough"``.
    """

    code: int
    how: str


class Script:
    """A file, or with ``module`` the name of a module as ``python -m`` takes it, and its arguments.

    Raises:
        TargetError: there is no such file or module.
    """

    def __init__(self, name: str, args: list[str], *, module: bool = False) -> None:
        self.name = name
        self.args = args
        self._main = ModuleType("__main__")
        self._code = self._of_module(name) if module else self._of_file(name)

    def _of_file(self, name: str) -> CodeType:
        path = Path(name)
        if path.is_dir():
            path /= "__main__.py"
        if not path.is_file():
            raise TargetError(f"there is no file {str(path)!r} to run")
        full = os.path.abspath(path)  # (as Python has it: links stay)
        with io.open_code(full) as file:
            code = compile(file.read(), full, "exec", dont_inherit=True)
        loader = importlib.machinery.SourceFileLoader("__main__", full)
        self._main.__dict__.update(
            __file__=full, __builtins__=builtins, __spec__=None, __package__=None, __loader__=loader, __cached__=None
        )
        self._path = str(path.resolve().parent)
        self._argv0 = name
        return code

    def _of_module(self, name: str) -> CodeType:
        self._path = str(Path.cwd())
        sys.path.insert(0, self._path)
        try:
            spec = importlib.util.find_spec(name)
            if spec is not None and spec.submodule_search_locations is not None:
                spec = importlib.util.find_spec(f"{name}.__main__")
        except ModuleNotFoundError as error:
            raise TargetError(f"there is no module {name!r} to run ({error})") from error
        finally:
            sys.path.remove(self._path)
        loader = None if spec is None else spec.loader
        if spec is None or not isinstance(loader, importlib.machinery.SourceFileLoader):
            raise TargetError(f"there is no module {name!r} to run that is Python source")
        code = loader.get_code(spec.name)
        assert code is not None
        self._main.__dict__.update(
            __file__=spec.origin, __builtins__=builtins, __spec__=spec, __package__=spec.parent, __loader__=loader
        )
        self._argv0 = str(spec.origin)
        return code

    def run(self, afterwards: Callable[[], None], *, stays: bool = False) -> Ended:
        """Run it to its end, then ``afterwards``, and say how it ended.

        An error is printed as Python prints it: by ``sys.excepthook``, with the user's frames alone. Threads that it
        started and that are not daemons are waited for.

        Args:
            stays: leave ``__main__``, the arguments and the path as they are for what runs at the process's exit.
        """
        before = sys.argv, sys.path[:], sys.modules.get("__main__")
        sys.argv = [self._argv0, *self.args]
        sys.path[0:1] = [self._path] if _is_entry(sys.path[0]) else [self._path, *sys.path[0:1]]
        sys.modules["__main__"] = self._main
        try:
            with _Threads() as threads:
                ended = threads.run(self._run)
            afterwards()
        finally:
            if not stays:
                sys.argv, sys.path[:] = before[0], before[1]
                if before[2] is not None:
                    sys.modules["__main__"] = before[2]
        return ended

    def _run(self) -> Ended:
        try:
            exec(self._code, self._main.__dict__)
        except Enough:
            return Ended(0, "enough")
        except SystemExit as error:
            if error.code is None or isinstance(error.code, int):
                return Ended(error.code or 0, "exit")
            with suppress(*_NO_STREAM):
                print(error.code, file=sys.stderr)
            return Ended(1, "exit")
        except BaseException as error:
            _print(error)
            return Ended(130, "interrupt") if isinstance(error, KeyboardInterrupt) else Ended(1, "error")
        return Ended(0, "end")


_NO_STREAM = (ValueError, OSError, AttributeError)  # closed, broken, None


def flush() -> None:
    """Write out what the script printed, to whatever it left as its streams."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(*_NO_STREAM):
            stream.flush()


def _is_entry(path: str) -> bool:
    """Whether ``sys.path[0]`` is what Python put there for our own command, which the script's takes the place of."""
    own = Path(sys.argv[0]).parent
    return path == "" or Path(path).resolve() == own.resolve() or Path(path).resolve() == Path.cwd().resolve()


_OURS = frozenset(str(Path(__file__).with_name(name)) for name in ("script.py", "observer.py", "tape.py"))


def _without_ours(error: BaseException) -> None:
    """Take the frames of what runs and watches the script out of an error's traceback, and of those behind it."""
    behind: list[BaseException | None] = [error]
    seen: set[int] = set()
    while behind:
        each = behind.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        steps = []
        trace: TracebackType | None = each.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename not in _OURS:
                steps.append(trace)
            trace = trace.tb_next
        for step, after in zip(steps, [*steps[1:], None], strict=True):
            step.tb_next = after
        each.__traceback__ = steps[0] if steps else None
        behind += [each.__cause__, each.__context__]


def _print(error: BaseException) -> None:
    _without_ours(error)
    trace = error.__traceback__
    flush()
    try:
        sys.excepthook(type(error), error, trace)
    except Exception:  # a hook of the user's that fails
        with suppress(*_NO_STREAM):
            traceback.print_exception(type(error), error, trace)
    flush()


class _Threads:
    """The script's threads: they are waited for, and `Enough` in one of them ends the main one too, without a word."""

    def __init__(self) -> None:
        self._main = threading.current_thread()
        self._runs = self._enough = False
        self._undo = ExitStack()

    def __enter__(self) -> _Threads:
        self._others = threading.excepthook
        threading.excepthook = self._ended
        if _WAKES is not None and self._main is threading.main_thread():
            self._undo.callback(signal.signal, _WAKES, signal.signal(_WAKES, self._woken))
        return self

    def __exit__(self, *error: object) -> None:
        if threading.excepthook == self._ended:  # (the script may have put its own in place)
            threading.excepthook = self._others
        self._undo.close()

    def run(self, script: Callable[[], Ended]) -> Ended:
        self._runs = True
        ended = script()
        self._runs = False
        for thread in threading.enumerate():
            if thread not in (threading.current_thread(), threading.main_thread()) and not thread.daemon:
                thread.join()
        return Ended(0, "enough") if self._enough and ended.code == 0 else ended

    def _ended(self, args: threading.ExceptHookArgs) -> None:
        if not issubclass(args.exc_type, Enough):
            self._others(args)
            return
        self._enough = True
        if _WAKES is not None and self._main is threading.main_thread() and self._main.ident is not None:
            signal.pthread_kill(self._main.ident, _WAKES)

    def _woken(self, *_: object) -> None:
        if self._runs:
            raise Enough
