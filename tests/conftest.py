"""Warnings of the libraries under test that a case provokes on purpose or cannot avoid; all others are errors."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from frostline.kernels import kernels_active

os.environ["FROSTLINE_CACHE"] = "off"  # figures are held to the truth as asked for now, not as once remembered
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every model is built from a configuration

FILTERS = {
    # The old hook is what the case `weight_norm_hook` is about.
    r"ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning",
    # `checkpoint_reentrant_cut` and others: a reentrant checkpoint that cuts the gradient warns, as it should.
    r"ignore:None of the inputs have requires_grad=True:UserWarning",
    # `hooks`: the module's inputs require no grad while everything before it is frozen.
    r"ignore:Full backward hook is firing when gradients are computed:UserWarning",
    # `conv_paddings` has an even kernel under padding="same".
    r"ignore:Using padding='same' with even kernel lengths:UserWarning",
    # peft 0.21 still asks transformers 5.20 for its old property.
    r"ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
}


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # the models are tiny: two workers with two threads each took over five times as long
    for line in sorted(FILTERS):
        config.addinivalue_line("filterwarnings", line)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the reports in tests/golden anew")


@pytest.fixture(autouse=True)
def _no_kernels_left() -> Iterator[None]:
    """A run that a test leaves open would be in every test after it."""
    yield
    assert not kernels_active()
