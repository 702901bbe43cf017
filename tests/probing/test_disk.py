"""Probes kept between runs come back as they were, and a bad file is only ever a slower start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.cases import CASES
from tests.truth.comparing import FIGURES, trace_case
from torch import nn

import frostline as fl
from frostline.probing import disk, store


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path))
    monkeypatch.setattr(store, "_shared", {})
    disk.disk.cache_clear()
    yield tmp_path
    disk.disk.cache_clear()


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new process would know."""
    monkeypatch.setattr(store, "_shared", {})
    disk.disk.cache_clear()


def figures(name: str) -> tuple[list[int | None], int]:
    trace = trace_case(CASES[name]())
    cost = trace.cost("@all")
    return [getattr(cost, figure) for figure in FIGURES], trace._coster.ledger.store.num_asked


@pytest.mark.parametrize("name", ["batch_norm_cnn_train", "lstm_classifier", "attention_causal", "many_ops"])
def test_a_second_process_asks_nothing_and_says_the_same(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, asked = figures(name)
    forget(monkeypatch)
    second, asked_again = figures(name)
    assert second == first
    assert asked > 0
    assert asked_again == 0


@pytest.mark.parametrize("damage", [b"", b"no database", None])
def test_a_damaged_store_is_rebuilt(damage: bytes | None, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = figures("mnist_cnn")
    (path,) = folder.glob("probes-*.sqlite")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if damage is None else damage)
    forget(monkeypatch)
    assert figures("mnist_cnn")[0] == first
    forget(monkeypatch)
    assert figures("mnist_cnn") == (first, 0)


def test_a_folder_that_cannot_be_written_is_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setenv("FROSTLINE_CACHE", str(blocked / "below"))
    forget(monkeypatch)
    try:
        trace = fl.trace(nn.Linear(16, 4), torch.randn(8, 16), loss=lambda y: y.sum())
        assert trace.cost(train="weight").saved_bytes == 512
    finally:
        disk.disk.cache_clear()
