"""Probes kept between runs: one small database per version of torch, of the machine's kernels and of this code.

Only ops of torch's own are kept, since nothing else is known to stay as it is. What is stale has another name, what
is damaged is deleted, and what cannot be read or written is done without. ``FROSTLINE_CACHE`` names another folder, or
``off``.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch

from frostline.probing.attribution import RanOp
from frostline.probing.probe import Gradient, Held, Probe, Question
from frostline.tracing.calls import Side, TensorMeta


class _Unstorable(TypeError):  # noqa: N818
    """A value that has no place in the database."""


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, TensorMeta):
        parts = (value.shape, value.stride, value.dtype, value.device, value.layout, value.lazy)
        return {"tensor": [_encode(part) for part in parts]}
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item) for item in value]}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[key, _encode(item)] for key, item in value.items()]}
    raise _Unstorable(type(value).__name__)


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return TensorMeta(*(_decode(part) for part in content))
    if kind == "torch":
        return getattr(torch, content)
    if kind == "device":
        return torch.device(content)
    if kind == "tuple":
        return tuple(_decode(item) for item in content)
    return {key: _decode(item) for key, item in content}


def _encode_op(ran: RanOp) -> list[Any]:
    if ran.op.namespace != "aten":
        raise _Unstorable(str(ran.op))
    sides = [None if side is None else int(side) for side in ran.sides]
    given = [_encode(ran.args), _encode(ran.kwargs), _encode(ran.outputs)]
    more = [sides, ran.recomputed, ran.alive, sorted(ran.saved)]
    return [ran.op._schema.name.removeprefix("aten::"), ran.op._overloadname, *given, *more]


def _decode_op(stored: list[Any]) -> RanOp:
    name, overload, args, kwargs, outputs, sides, recomputed, alive, saved = stored
    op = getattr(getattr(torch.ops.aten, name), overload)
    known = tuple(None if side is None else Side(side) for side in sides)
    given = (_decode(args), _decode(kwargs), _decode(outputs))
    return RanOp(op, *given, known, recomputed, alive=alive, saved=frozenset(saved))


def dump(found: Probe) -> str:
    """A probe as JSON. Raises TypeError if it holds what JSON cannot bring back."""
    held = [[h.kind, h.index, h.nbytes, h.secondary] for h in found.held]
    ops = [[_encode_op(op) for op in found.backward], [_encode_op(op) for op in found.forward]]
    lie = [[g.index, g.given, g.storage, g.nbytes, g.fits, g.stride, g.view] for g in found.gradients]
    return json.dumps(
        [held, *ops, sorted(found.defined), list(found.sparse), found.refusal, found.confirmed, lie, found.lean]
    )


def load(text: str) -> Probe:
    """The probe that `dump` wrote."""
    held, backward, forward, defined, sparse, refusal, confirmed, lie, lean = json.loads(text)
    gradients = tuple(Gradient(i, given, at, size, fits, tuple(s), view) for i, given, at, size, fits, s, view in lie)
    return Probe(
        held=tuple(Held(kind, index, nbytes, secondary) for kind, index, nbytes, secondary in held),
        backward=tuple(map(_decode_op, backward)),
        forward=tuple(map(_decode_op, forward)),
        defined=frozenset(defined),
        sparse=tuple((index, nbytes) for index, nbytes in sparse),
        refusal=refusal,
        confirmed=confirmed,
        gradients=gradients,
        lean=lean,
    )


class Disk:
    """A database of answers, as text. Every failure of it means: ask again.

    Args:
        dump, load: an answer to text and back; ``dump`` may raise TypeError for what text cannot bring back.
    """

    def __init__(self, path: Path, dump: Callable[[Any], str], load: Callable[[str], Any]) -> None:
        self.path = path
        self._dump = dump
        self._load = load
        self._connection: sqlite3.Connection | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = self._open()
        except sqlite3.DatabaseError:
            self._start_again()
        except OSError:
            return

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=1.0, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT)")
        return connection

    def _start_again(self) -> None:
        self._connection = None
        with suppress(OSError, sqlite3.Error):
            self.path.unlink(missing_ok=True)
            self._connection = self._open()

    def get(self, key: str) -> Any:
        """The answer kept under ``key``; None if there is none."""
        if self._connection is None:
            return None
        try:
            with closing(self._connection.execute("SELECT answer FROM answers WHERE key = ?", (key,))) as rows:
                row = rows.fetchone()
            return None if row is None else self._load(row[0])
        except Exception:  # damaged, however it shows
            self._start_again()
            return None

    def put(self, key: str, answer: Any) -> None:
        """Keep an answer, at once: a process that is killed has lost nothing that was put."""
        if self._connection is None:
            return
        with suppress(TypeError, sqlite3.Error):
            self._connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, self._dump(answer)))


def key_of(like: Any, question: Question) -> str:
    """A name for a call and a question that is the same in every process."""
    asked = (sorted(question.mask), None if question.needed is None else sorted(question.needed))
    return hashlib.sha256(repr((like, asked, sorted(question.receives), question.strides)).encode()).hexdigest()


def folder() -> Path | None:
    """Where answers are kept; None if ``FROSTLINE_CACHE`` is ``off``."""
    where = os.environ.get("FROSTLINE_CACHE", "")
    if where.lower() == "off":
        return None
    if not where:
        import platformdirs

        where = platformdirs.user_cache_dir("frostline")
    return Path(where)


@functools.cache
def disk() -> Disk | None:
    """The probes of this torch, this machine's kernels and this code; None if nothing is to be kept."""
    where = folder()
    return (
        None if where is None else Disk(where / f"probes-{digest('probing', 'tracing', 'kernels')}.sqlite", dump, load)
    )


def digest(*rooms: str) -> str:
    """What answers depend on besides their questions: the code of these rooms, torch, and the machine's kernels."""
    package = Path(__file__).parents[1]
    code = [path.read_bytes() for room in rooms for path in sorted((package / room).glob("*.*"))]
    machine = (torch.__version__, torch.backends.cpu.get_cpu_capability(), torch.backends.mkldnn.is_available())
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return hashlib.sha256(b"".join(code) + repr((machine, gpus)).encode()).hexdigest()[:16]
