"""Several processes that train together: which of them this is, and whether they end with the same parameters.

They meet in the process group's own store, at the latest moment at which all of them still have it: when the script
destroys the group, or else at the end. Ranks that are not watched themselves are not waited for long.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from frostline.running.values import digests
from frostline.watching.record import ApartFact, ParameterFact, Record

_PATIENCE = 30.0
"""Seconds that rank 0 waits for the others."""
_BEGINS_WITHIN = 10.0
"""... for one that has not begun when rank 0 has ended: it is behind, or not watched."""
_sessions = itertools.count()


class Ranks:
    """Of one watching: tells the other ranks of it, and in the end compares parameters with theirs."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self._store: Any = None
        self._met = False

    def look(self) -> None:
        """Note which rank this is, and let the others know that it is watched."""
        if self._store is not None or not _is_initialized():
            return
        self.record.rank, self.record.num_ranks = dist.get_rank(), dist.get_world_size()
        c10d: Any = dist.distributed_c10d
        self._store = c10d.PrefixStore(f"frostline/{next(_sessions)}", c10d._get_default_store())
        self._store.set(f"watched/{self.record.rank}", "")

    def meet(self) -> None:
        """Say what the parameters are; rank 0 then hears the others."""
        if self._met or self._store is None or not _is_initialized():
            return
        self._met = True
        ours = _said(self.record)
        if self.record.rank:
            self._store.set(f"said/{self.record.rank}", json.dumps(ours))
            return
        heard, deadline = {}, time.monotonic() + _PATIENCE
        for rank in range(1, self.record.num_ranks):
            said = self._hear(rank, deadline)
            if said is None:
                self.record.notes.append(
                    f"rank {rank} is not compared with rank 0: it is not watched, made no step, or did not end"
                )
            else:
                heard[rank] = said
        self.record.apart = list(_apart(self.record, ours, heard))

    def _hear(self, rank: int, deadline: float) -> dict[str, Any] | None:
        """What another rank says; None if it is not watched, or says nothing in time."""
        with suppress(RuntimeError):  # (a timeout, or a store that is gone)
            self._store.wait([f"watched/{rank}"], timedelta(seconds=_BEGINS_WITHIN))
            self._store.wait([f"said/{rank}"], timedelta(seconds=max(0.1, deadline - time.monotonic())))
            said: dict[str, Any] = json.loads(self._store.get(f"said/{rank}"))
            return said
        return None


def own_rank(record: Record) -> int:
    """The rank of this process: of its process group, or else what torchrun says."""
    return record.rank or (int(os.environ.get("RANK", "0")) if os.environ.get("WORLD_SIZE", "1") != "1" else 0)


@contextmanager
def alone() -> Iterator[None]:
    """No default process group: what runs again here must not wait for the other ranks."""
    if not _is_initialized():
        yield
        return
    group: Any = dist.GroupMember
    world, group.WORLD = group.WORLD, None
    try:
        yield
    finally:
        group.WORLD = world


def is_world(group: Any) -> bool:
    """Whether this is what stands for the default group."""
    return group is None or group is dist.GroupMember.WORLD


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def _keyed(record: Record) -> dict[str, ParameterFact]:
    """The parameters under names that are the same on every rank; those that are spread over ranks are left out."""
    found = {}
    for number, model in enumerate(record.models):
        for fact in model.parameters.values():
            if type(fact.parameter) is nn.Parameter:
                found[f"{number} {model.variable} {fact.name} {tuple(fact.parameter.shape)}"] = fact
    return found


def _said(record: Record) -> dict[str, Any]:
    """Of each parameter: checksums of its values when first seen and now, and its norm."""
    facts = _keyed(record)
    now = digests((key, fact.parameter) for key, fact in facts.items())
    said = {}
    for key, fact in facts.items():
        last = now[key]
        if fact.first is not None and last is not None:
            norm = float(torch.linalg.vector_norm(fact.parameter.detach().double()))
            said[key] = [fact.first.hex(), last.hex(), norm]
    return said


def _apart(record: Record, ours: dict[str, Any], heard: dict[int, dict[str, Any]]) -> Iterator[ApartFact]:
    facts = _keyed(record)
    for key, (first, last, norm) in ours.items():
        others = {rank: said[key] for rank, said in heard.items() if key in said and said[key][1] != last}
        if others:
            their_first, _, their_norm = next(iter(others.values()))
            yield ApartFact(id(facts[key].parameter), tuple(others), first == their_first, norm, their_norm)
