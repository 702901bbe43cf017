"""The rules, one a file: each reads the facts of a record and says what it found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from frostline.watching.finding import Finding, Level
from frostline.watching.record import Record
from frostline.watching.steps import Steps


@dataclass(frozen=True)
class Rule:
    """A rule: its id, its level, and what looks for it."""

    id: str
    level: Level
    find: Callable[[Record, Steps], Iterator[Finding]]


def rules() -> tuple[Rule, ...]:
    """Every rule, those of what is wrong first."""
    from frostline.watching.rules import (
        cacheable_prefix,
        checkpoint_blocks_grad,
        clip_covers_unowned,
        early_param_forces_backward,
        forced_input_grad,
        freeze_missed,
        frozen_moved,
        frozen_norm_drift,
        grad_off_over_trainable,
        memory_given_back,
        never_updated,
        partial_mask_leak,
        ranks_differ,
        stale_optimizer,
        stochastic_frozen,
        tied_surprise,
        unneeded_saved_tensors,
        unowned_grad,
    )

    modules = (
        frozen_norm_drift, never_updated, grad_off_over_trainable, checkpoint_blocks_grad, frozen_moved, freeze_missed,
        clip_covers_unowned, stale_optimizer, partial_mask_leak, ranks_differ, unowned_grad,
        early_param_forces_backward, forced_input_grad, tied_surprise, unneeded_saved_tensors, cacheable_prefix,
        stochastic_frozen, memory_given_back,
    )  # fmt: skip
    return tuple(module.RULE for module in modules)
