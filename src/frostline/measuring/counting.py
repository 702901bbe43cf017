"""One step under observation: the FLOPs of the ops that really run, and what autograd holds when the loss returns."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from frostline.costing.formulas import flops
from frostline.kernels import takes_no_memory
from frostline.measuring.loop import Loop
from frostline.probing.storages import living, storages_of
from frostline.running.kept import Seen, kept_when_returned
from frostline.running.train_only import is_compiled
from frostline.tracing.calls import flat_outputs


@dataclass(frozen=True)
class Counts:
    """What one step did.

    Attributes:
        forward_flops, backward_flops: a multiply-add is 2; recomputation by checkpoints is backward.
        saved_bytes: distinct storages that autograd held when the loss returned, outside parameters and buffers; None
            of a compiled model.
        uncounted: ops without a formula; not in any total.
        other: storages that the step used and found there: neither parameters, buffers nor inputs, such as targets
            that the loss brings along; by address, in bytes.
    """

    forward_flops: int
    backward_flops: int
    saved_bytes: int | None
    uncounted: tuple[str, ...]
    other: dict[int, int]


def count(loop: Loop) -> Counts:
    """Run one step (its optimizer too) and count.

    Assumes, for ``saved_bytes``: what the forward allocated and is still there when the loss has returned is held by
    autograd, but for what running functions and the model's modules hold; of these and of what was there before, what
    the nodes saved or are to put a gradient on. So an input that only a checkpoint keeps does not count. A compiled
    model is counted as it runs without torch.compile, which alone knows what it keeps: ``saved_bytes`` is None.
    """
    watch = _Watch(loop)
    gc.collect()
    compiled = is_compiled(loop.model)
    # (Under a dispatch mode torch.compile would give its code up, for the steps that come after as well.)
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext(), watch:
        loop.step(watch.mark)
    return Counts(
        forward_flops=watch.flops["forward"],
        backward_flops=watch.flops["backward"],
        saved_bytes=None if compiled else watch.saved_bytes,
        uncounted=tuple(sorted(watch.uncounted)),
        other=watch.other(),
    )


class _Watch(TorchDispatchMode):
    """Sees every op of a step, forward and backward."""

    def __init__(self, loop: Loop) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.loop = loop
        self.phase = "forward"
        self.flops = {"forward": 0, "backward": 0, "optimizer": 0}
        self.uncounted: set[str] = set()
        self.saved_bytes = 0
        self._seen = Seen()

    def mark(self, phase: str, loss: Tensor) -> None:
        if phase == "forward":
            self.phase = "backward"
            self.saved_bytes = sum(kept_when_returned(self._seen, loss, self.loop.model).values())
        elif phase == "backward":
            self.phase = "optimizer"

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.phase == "optimizer":
            return op(*args, **kwargs)
        self._seen.given((args, kwargs))
        out = op(*args, **kwargs)
        each = flops(op, args, kwargs, flat_outputs(out))
        if each is None:
            self.uncounted.add(str(op))
        else:
            self.flops[self.phase] += sum(each)
        self._seen.returned(out)
        return out

    def other(self) -> dict[int, int]:
        """Storages that were there before and still are, by the address of their memory."""
        loop = self.loop
        known = [*loop.model.parameters(), *loop.model.buffers(), loop.args, loop.kwargs]
        known += [p.grad for p in loop.model.parameters() if p.grad is not None]
        keys = {s._cdata for s in storages_of(known)}
        found = [storage for key, storage in living(self._seen.found) if key not in keys]
        return {s.data_ptr(): s.nbytes() for s in found if s.nbytes() and s.data_ptr() and not takes_no_memory(s)}
