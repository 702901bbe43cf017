"""How ElasticTrainer and GreenTrainer choose tensors under a budget, written anew from what they say of it.

Source: Huang, Yang and Gao, "ElasticTrainer: Speeding Up On-Device Training with Runtime Elastic Tensor Selection",
MobiSys 2023; Huang, Yin, Huang and Gao, "Towards Green AI in Fine-tuning Large Language Models via Adaptive
Backpropagation", ICLR 2024. Theirs is a loop in Python; this one takes all budgets of a layer at once, and is faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

STEPS = 1000  # what all of the backward is quantised to


@dataclass(frozen=True)
class Chain:
    """A network as a chain of tensors, the one nearest the loss first.

    Attributes:
        passing: what it takes to pass the gradient by each tensor (their t_dy).
        own: what the gradient of each takes by itself (their t_dw).
        importance: what each is worth.
    """

    passing: Sequence[float]
    own: Sequence[float]
    importance: Sequence[float]

    def quantised(self, steps: int = STEPS) -> tuple[Chain, float]:
        """In whole steps, rounded down; and how many steps the whole backward has kept, as a share."""
        scale = steps / (sum(self.passing) + sum(self.own))
        passing, own = ([int(value * scale) for value in values] for values in (self.passing, self.own))
        return Chain(passing, own, self.importance), (sum(passing) + sum(own)) / steps


def chosen_by_chain(chain: Chain, limit: int) -> list[int]:
    """The places chosen for whole costs within ``limit``, by the peers' recurrence.

    best[k][t]: the importance of what is chosen of the first k tensors, within t: that of k - 1, or tensor k beside
    best[j][t - own[k] - passing[j..k-1]] for the j before it whose last tensor is chosen, wherever that is more. Only
    as many tensors are looked at as the gradient can be passed by within the limit, and never the last one.
    """
    own, importance = chain.own, chain.importance
    reach = np.cumsum(chain.passing)
    beyond = np.flatnonzero(reach > limit)
    count = int(beyond[0]) if len(beyond) else len(own) - 1
    best = np.zeros((count + 1, limit + 1), dtype=np.float32)
    ends_chosen = np.zeros((count + 1, limit + 1), dtype=bool)
    ends_chosen[0] = ends_chosen[:, 0] = True
    before = np.full((count + 1, limit + 1, 2), -1, dtype=np.int32)  # (how many of the first, within how much)
    for k in range(1, count + 1):
        most = best[k - 1].copy()
        shift = own[k - 1]
        for j in range(k - 1, -1, -1):
            shift += chain.passing[j]
            if shift > limit:
                break
            room = limit + 1 - shift
            here = best[j, :room] + np.float32(importance[k - 1])
            more = ends_chosen[j, :room] & (here > most[shift:])
            most[shift:][more] = here[more]
            before[k, shift:][more] = np.stack([np.full(int(more.sum()), j), np.flatnonzero(more)], axis=1)
        taken = before[k, :, 0] >= 0
        best[k] = np.where(taken, most, best[k - 1])
        ends_chosen[k] = taken
    k, t = np.unravel_index(int(best[1:].argmax()), best[1:].shape) if count else (-1, 0)
    place, within = int(k) + 1, int(t)
    found: list[int] = []
    while place > 0:
        j, t_before = before[place, within]
        if j < 0:
            place -= 1
            continue
        found.append(place - 1)
        place, within = int(j), int(t_before)
    return sorted(found)
