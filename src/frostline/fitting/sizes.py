"""One step traced at many sizes, each once, and what its rows cost there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from frostline.costing.cost import Cost
from frostline.errors import FitError, FrostlineError
from frostline.fitting.bounds import longest
from frostline.fitting.resizing import Resizer, Values
from frostline.subsets import Subset
from frostline.tracing.trace import Trace

Size = tuple[int, int | None]  # batch, length
Say = Callable[[str], None]


class Sizes:
    """Traces by size. A size at which the step raises is remembered with what it raised."""

    def __init__(self, resizer: Resizer, optimizer: Any, say: Say) -> None:
        self.resizer = resizer
        self.optimizer = optimizer
        self.say = say
        self.traces: dict[Size, Trace] = {}
        self.errors: dict[Size, Exception] = {}
        self.calibrated: set[tuple[Size, Any]] = set()

    # -- which size is which -------------------------------------------------------------------------------------------

    @property
    def given(self) -> Size:
        return self.resizer.batch.size, None if self.resizer.length is None else self.resizer.length.size

    def size(self, kind: str, size: int) -> Size:
        """A size along one axis, the other as given."""
        return (size, self.given[1]) if kind == "batch" else (self.given[0], size)

    def along(self, kind: str) -> list[int]:
        """The sizes along one axis that were asked about, the other as given."""
        at = kind != "batch"
        here = [size for size in (*self.traces, *self.errors) if size[not at] == self.given[not at]]
        return sorted({size[at] or 0 for size in here})

    # -- traces and costs ----------------------------------------------------------------------------------------------

    def trace(self, size: Size) -> Trace | None:
        """The step at this size; None if it raises there."""
        if size not in self.traces and size not in self.errors:
            batch, length = size
            self.say(f"tracing batch {batch:,}" + ("" if length is None else f", length {length:,}"))
            try:
                self.traces[size] = self.resizer.trace(batch, length)
            except Exception as error:  # the step's own: such a batch or length it does not take
                self.errors[size] = error
        return self.traces.get(size)

    def cost(self, size: Size, subset: Any, method: str = "freeze") -> Cost | None:
        """What a subset costs at this size; None if the step raises there, forward or backward."""
        traced = self.trace(size)
        try:
            return None if traced is None else traced.cost(subset, method=method, optimizer=self.optimizer)
        except FrostlineError:
            raise
        except Exception as error:
            self.errors[size] = error
            del self.traces[size]
            return None

    def with_scratch(self, size: Size, subset: Subset, method: str) -> Cost | None:
        """A cost whose peak knows the kernels' scratch memory: each distinct op is run, alone."""
        found = self.cost(size, subset, method)
        key = (size, (subset, method))
        if found is not None and key not in self.calibrated:
            self.calibrated.add(key)
            at = f"batch {size[0]:,}" + ("" if size[1] is None else f", length {size[1]:,}")
            found.trace.calibrate(
                [found], self.optimizer, lambda done, total: self.say(f"running ops at {at}: {done} of {total}")
            )
        return found

    # -- checks --------------------------------------------------------------------------------------------------------

    def choose_values(self) -> None:
        """Take inputs without values (or only integers with values) if that leads to the trace that was given."""
        base = self.resizer.base
        told = _figures(base.cost("@all", optimizer=self.optimizer))
        for values in Values if base.forward == "fake" else (Values.ALL,):
            self.resizer.values = values
            self.traces.clear()
            self.errors.clear()
            found = self.cost(self.given, "@all")
            if found is not None and _figures(found) == told:
                return
        if found is None:
            raise self.errors[self.given]

    def check_batch(self) -> None:
        """Double the batch, or say that it cannot be done.

        Raises:
            FitError: the step raises, or computes no more than before.
        """
        chosen = self.resizer.batch
        inputs_alone = chosen.without(list(self.resizer.of_loss))
        first = chosen.without([name for name in chosen.places if name != next(iter(chosen.places))])
        attempts = {str(axis): axis for axis in ((chosen,) if chosen.given else (chosen, inputs_alone, first))}
        why = ""
        for axis in attempts.values():
            self.resizer.batch = axis
            doubled = (2 * axis.size, self.given[1])
            self.errors.pop(doubled, None)
            one, two = self.cost(self.given, "@all"), self.cost(doubled, "@all")
            if one is None or two is None:
                why = why or f"with it doubled the step raises {said(self.errors[doubled])}"
            elif two.forward_flops > one.forward_flops or two.saved_bytes > one.saved_bytes:
                return
            else:
                why = why or "with it doubled the step computes no more than before"
                del self.traces[doubled]
        raise FitError(
            f"no batch dimension was found: taking {chosen}, {why}. Say which it is: batch={{'NAME': 0}}, on the "
            "command line --batch-dim NAME=0 (tensors of the loss are named loss.NAME)"
        )

    def check_length(self) -> tuple[int | None, str, str]:
        """Trace another length. Returns the longest there may be, why, and a note if it cannot be another at all."""
        axis = self.resizer.length
        if axis is None:
            return None, "", ""
        most, why = longest(self.traces[self.given], axis.size)
        tried = [2 * axis.size] if most is None or 2 * axis.size <= most else []
        tried.append(max(axis.size // 2, 1))
        for length in tried:
            if self.cost((self.given[0], length), "@all") is not None:
                return most, why, ""
        raised = f"with length {tried[-1]:,} the step raises {said(self.errors[(self.given[0], tried[-1])])}"
        if axis.given:
            raise FitError(f"the sequence length cannot be another: taking {axis}, {raised}")
        self._forget_length()
        return None, "", f"the sequence length was not varied: taking {axis}, {raised}"

    def _forget_length(self) -> None:
        here = self.given
        self.resizer.length = None
        self.traces = {(batch, None): t for (batch, length), t in self.traces.items() if length == here[1]}
        self.errors = {(batch, None): e for (batch, length), e in self.errors.items() if length == here[1]}


def _figures(cost: Cost) -> tuple[Any, ...]:
    return cost.trace.forward, cost.step_flops, cost.saved_bytes


def said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
