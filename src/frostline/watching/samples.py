"""Whether training sees its samples again: a checksum of each, along the batch dimension of a model's inputs.

Asked only where a sizeable part of the model is frozen, and works on what no trained parameter comes before.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from frostline.running.values import is_plain
from frostline.watching.record import SamplesFact
from frostline.watching.tape import leaves

_WORTH = 500
"""Multiply-adds of the frozen part for each number of its input: so many take far longer than the checksum."""
_MOST_SAMPLES = 1 << 20
_MOST_NUMBERS = 1 << 22  # of one sample
_MOST_CALLS = 4  # of one model in one pass
_AT_ONCE = 256
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(eq=False)
class _Called:
    """A module that is called from outside of any other.

    Attributes:
        work: of the modules inside it that no gradient is to reach, by id: the multiply-adds of their calls in the
            inspected steps.
        numbers: of its inputs in the same calls.
        witness: the id of the one that works most; -1 until the inspection is over.
        ran: whether the witness ran since the last pass.
        calls: how often a pass calls it.
        latest: the checksums of its latest calls, which the next pass may be of.
        marks, steps: those that were trained on, and in which step.
    """

    work: Counter[int] = field(default_factory=Counter)
    numbers: int = 0
    witness: int = -1
    ran: bool = False
    calls: int = 1
    latest: deque[Tensor] = field(default_factory=lambda: deque(maxlen=_MOST_CALLS))
    marks: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    num_samples: int = 0

    @property
    def is_sizeable(self) -> bool:
        return sum(self.work.values()) >= _WORTH * max(self.numbers, 1)

    @property
    def goes_on(self) -> bool:
        return self.is_sizeable and self.num_samples < _MOST_SAMPLES


class Samples:
    """Looks at what is called from outside of any module. Nothing is read back from a device before `facts`."""

    def __init__(self) -> None:
        self._called: dict[int, _Called] = {}
        self._weights: dict[torch.device, Tensor] = {}
        self.asked = True
        """Whether there is anything left to look at after the steps that are inspected."""

    def returned(
        self, module: nn.Module, top: nn.Module, args: Any, kwargs: Any, result: Any, *, inspect: bool
    ) -> None:
        """Note that a module has returned, in a call of ``top`` (which may be itself) from outside."""
        found = self._called.get(id(top))
        if found is None:
            if not inspect:
                return
            found = self._called[id(top)] = _Called()
        if not inspect:
            if found.witness == -1:
                found.witness = max(found.work, key=found.work.__getitem__, default=0)
            found.ran |= id(module) == found.witness and not _needs_grad(result)
        elif (work := _frozen_work(module, result)) > 0:
            found.work[id(module)] += work
            found.ran = True
        if module is top and found.ran and (inspect or found.goes_on):
            given = list(leaves((args, kwargs)))
            marks = self._checksums(given)
            if marks is not None:
                found.latest.append(marks)
                found.numbers += sum(tensor.numel() for tensor in given) if inspect else 0

    def expect(self, calls: Counter[int]) -> None:
        """Say how often a pass calls each module, by id."""
        for number, count in calls.items():
            if number in self._called:
                self._called[number].calls = count

    def trained(self, step: int, *, inspect: bool) -> None:
        """Note that a backward begins: what was called last is trained on."""
        for found in self._called.values():
            for marks in list(found.latest)[-found.calls :] if found.ran else ():
                found.marks.append(marks)
                found.steps.append(torch.full_like(marks, step))
                found.num_samples += marks.numel()
            found.latest.clear()
            found.ran = False
            if len(found.marks) >= _AT_ONCE:
                found.marks, found.steps = [torch.cat(found.marks)], [torch.cat(found.steps)]
        if not inspect:
            self._choose()

    def _choose(self) -> None:
        """After the inspection: what is worth looking at further."""
        for number in [number for number, found in self._called.items() if not found.is_sizeable]:
            del self._called[number]
        self.asked = any(found.goes_on for found in self._called.values())

    def facts(self) -> dict[int, SamplesFact]:
        """Of each module that was called from outside, by id: what samples it was trained on."""
        return {n: _fact(each) for n, each in self._called.items() if each.num_samples and each.is_sizeable}

    # -- checksums -----------------------------------------------------------------------------------------------------

    def _checksums(self, tensors: list[Tensor]) -> Tensor | None:
        """A number for each sample, of all its bits; None where they cannot be read sample by sample."""
        tensors = [tensor.detach() for tensor in tensors if tensor.numel()]
        if not tensors or not all(map(is_plain, tensors)) or not tensors[0].dim():
            return None
        samples = tensors[0].shape[0]
        with torch._C.DisableTorchFunction(), torch.no_grad():  # (of no concern to the script's own modes)
            total = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
            for tensor in tensors:
                own = tensor.dim() and tensor.shape[0] == samples
                bits = _bits(tensor).view(samples if own else 1, -1)
                if bits.shape[1] > _MOST_NUMBERS:
                    return None
                marks = (bits * self._weights_for(bits)).sum(1)
                total = total * 1_000_003 + marks.to(tensors[0].device)
        return total

    def _weights_for(self, bits: Tensor) -> Tensor:
        count, known = bits.shape[1], self._weights.get(bits.device)
        if known is None or len(known) < count:
            generator = torch.Generator().manual_seed(0)  # (one of our own: the script's numbers stay as they are)
            known = torch.randint(-(1 << 62), 1 << 62, (count,), generator=generator, device="cpu").to(bits.device)
            self._weights[bits.device] = known
        return known[:count]


def _frozen_work(module: nn.Module, result: Any) -> int:
    """About the multiply-adds of a call of a module with weights of its own that no gradient is to reach."""
    own = [p for p in module._parameters.values() if p is not None and p.dim() > 1]
    if not own or isinstance(module, nn.Embedding) or _needs_grad(result):
        return 0
    made = next(leaves(result), None)
    return 0 if made is None else made.numel() * max(p.numel() // max(p.shape[0], 1) for p in own)


def _needs_grad(result: Any) -> bool:
    return any(tensor.requires_grad for tensor in leaves(result))


def _bits(tensor: Tensor) -> Tensor:
    """The bits of a tensor, as integers."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.resolve_neg().contiguous().view(_INTEGERS[tensor.element_size()])


def _fact(called: _Called) -> SamplesFact:
    """Counted by optimizer steps: passes within one step see the same samples for reasons of their own."""
    pairs = torch.stack([torch.cat(called.steps), torch.cat(called.marks)]).cpu().unique(dim=1)
    return SamplesFact(pairs.shape[1], pairs[1].unique().numel())
