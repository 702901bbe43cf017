"""Random networks, as programs: drafts that hypothesis draws, written out as Python that surely runs.

A `Draft` is an op's name and a few numbers. `write` turns drafts into a `Program`: it carries each one out on real
tensors with every parameter trainable, choosing operands that fit by the draft's numbers and leaving out what torch
refuses, so that every list of drafts is a valid network and every shorter list of them too. A failing example prints
as a script that can be run by itself.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from tests.cases import Case, build
from tests.truth import random_functions
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
