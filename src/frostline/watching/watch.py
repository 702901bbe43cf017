"""``fl.watch``: see what a training loop wastes, and what is silently wrong."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

from frostline.costing.cost import Cost
from frostline.errors import FrostlineError
from frostline.watching.finding import Figures, Finding, Level
from frostline.watching.observer import Observer
from frostline.watching.record import ParameterFact, Record
from frostline.watching.rules import Rule, rules
from frostline.watching.steps import Steps
from frostline.watching.values import ValueFact


def watch(*, ignore: Iterable[str] = (), values: bool = False, time: bool = False) -> Watch:
    """Watch the training in a ``with`` block; afterwards it says what was found.

    >>> import torch, frostline as fl
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> with fl.watch() as seen:
    ...     optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    ...     model(torch.randn(3, 4)).sum().backward()
    ...     optimizer.step()
    >>> [(finding.rule, finding.modules) for finding in seen.findings]
    [('unowned-grad', ('0',))]

    Args:
        ignore: ids of rules that are not to be asked.
        values: also note what flows through the modules: shapes, values, gradients, updates. The report has a table.
        time: after the block, time the ops of its step, so that findings have seconds. Without it they have them where
            `frostline.Trace.calibrate` has timed all of these ops before.

    What runs in it is not changed: no random number is drawn, no tensor of yours is written, and the hooks are taken
    away at the end. ``print(seen)`` is the report, ``seen.to_dict()`` the data.

    Raises:
        FrostlineError: there is no such rule.
    """
    return Watch(ignore=ignore, values=values, time=time)


class Watch:
    """What `watch` returns. ``record`` holds the facts; ``findings``, once the block has ended, what they say."""

    def __init__(
        self,
        name: str = "the block",
        ignore: Iterable[str] = (),
        on_step: Callable[[int], None] | None = None,
        *,
        values: bool = False,
        time: bool = False,
    ) -> None:
        self.record = Record(name)
        self._ignored = frozenset(ignore)
        unknown = sorted(self._ignored - {rule.id for rule in rules()})
        if unknown:
            known = ", ".join(rule.id for rule in rules())
            raise FrostlineError(f"there is no rule {unknown[0]!r}; there is {known}")
        self._observer = Observer(self.record, on_step, values=values)
        self._steps = Steps(self.record, time=time)
        self._findings: tuple[Finding, ...] | None = None
        self.open = False

    def __enter__(self) -> Watch:
        self._observer.open()
        self.open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._observer.close()
        self.open = False

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What the rules found, what is wrong first.

        Raises:
            FrostlineError: the block has not ended.
        """
        if self.open:
            raise FrostlineError("the findings are known when the block has ended")
        if self._findings is None:
            found = [finding for rule in rules() if rule.id not in self._ignored for finding in self._ask(rule)]
            order, faults = list(Level), self.record.pace.fault_seconds
            found.sort(key=lambda finding: order.index(finding.level))
            self._findings = tuple(finding.beside(faults) for finding in found)
        return self._findings

    def _ask(self, rule: Rule) -> list[Finding]:
        try:
            return list(rule.find(self.record, self._steps))
        except Exception as error:  # a mistake of ours must not take the other findings away
            self.record.notes.append(f"the rule {rule.id} failed ({type(error).__name__}: {error})")
            return []

    @property
    def is_clean(self) -> bool:
        """Whether nothing is wrong and nothing wasted."""
        return not any(finding.level is not Level.INFO for finding in self.findings)

    @property
    def now(self) -> Cost | None:
        """The step as it is."""
        usual = self._steps.usual()
        return None if usual is None else usual.cost()

    @property
    def now_figures(self) -> Figures | None:
        """What `now` says, beside the page faults of the steps that were seen."""
        return None if self.now is None else Figures.of(self.now).beside(self.record.pace.fault_seconds)

    @property
    def passes_in_step(self) -> int:
        """How many backward passes the step has that `now` is one of."""
        usual = self._steps.usual()
        if usual is None:
            return 0
        return sum(each.step == usual.fact.step and each.accumulates for each in self.record.passes)

    @property
    def fixed(self) -> Figures | None:
        """The step with all the findings' fixes."""
        return None if self._fixed is None else self._fixed.beside(self.record.pace.fault_seconds)

    @functools.cached_property
    def _fixed(self) -> Figures | None:
        usual = self._steps.usual()
        return None if usual is None else self._steps.otherwise(usual, [finding.effect for finding in self.findings])

    def who_trains(self) -> list[dict[str, Any]]:
        """Trained, the rest and buffers, each with how many tensors and numbers, and what happened to them."""
        facts = [fact for _, fact in self.record.facts()]
        trained = [fact for fact in facts if fact.owners and fact.was_trainable]
        rest = [fact for fact in facts if not (fact.owners and fact.was_trainable)]
        buffers = [buffer for model in self.record.models for buffer in model.buffers]
        rows = [_row("trained", trained), _row("the rest", rest)]
        moved = Counter(buffer.moved for buffer in buffers)[True]
        empty = {"requires_grad": None, "in_optimizer": None, "got_gradient": None}
        numbers = sum(buffer.numel for buffer in buffers)
        return [*rows, {"who": "buffers", "tensors": len(buffers), "numbers": numbers, **empty, "moved": moved}]

    @property
    def values(self) -> list[ValueFact]:
        """What flowed through each module in the last step that was inspected, in the order of the calls."""
        return [] if self._observer.values is None else self._observer.values.rows

    @property
    def first_nonfinite(self) -> ValueFact | None:
        """The first call of a module that returned a NaN or an infinity, in any step; None if there was none."""
        return None if self._observer.values is None else self._observer.values.first_nonfinite

    @property
    def notes(self) -> list[str]:
        """What was not seen, or could not be costed."""
        return list(dict.fromkeys([*self.record.notes, *self._steps.notes]))

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        from frostline.reports.watching import watch_to_dict

        return watch_to_dict(self)

    def __str__(self) -> str:
        from frostline.reports.watching import watch_text

        return watch_text(self)


def _row(who: str, facts: list[ParameterFact]) -> dict[str, Any]:
    return {
        "who": who,
        "tensors": len(facts),
        "numbers": sum(fact.numel for fact in facts),
        "requires_grad": sum(fact.was_trainable for fact in facts),
        "in_optimizer": sum(bool(fact.owners) for fact in facts),
        "got_gradient": sum(fact.got_gradient for fact in facts),
        "moved": sum(fact.moved for fact in facts),
    }
