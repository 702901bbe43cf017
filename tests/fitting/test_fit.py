"""``fl.fit``: what it finds, what it says, and that the real peaks agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.cases import Case, build
from tests.golden.models import Encoder, mean_square
from tests.truth.allocator import measure_peak
from torch import Tensor, nn
from torch.nn import functional as F

import frostline as fl
from examples.small import DigitsCNN
from frostline.errors import FitError


def mlp() -> nn.Module:
    return nn.Sequential(*(nn.Linear(64, 64) if i % 2 == 0 else nn.ReLU() for i in range(8)))


def images(count: int) -> Tensor:
    return torch.rand(count, 3, 28, 28)


def tokens(count: int) -> Tensor:
    return torch.randint(0, 1000, (count, 32))


Truth = tuple[Callable[[], nn.Module], Callable[[int], Tensor], str, tuple[str, ...], bool]
TRUTHS: dict[str, Truth] = {
    "mlp": (mlp, lambda count: torch.rand(count, 64), "2MiB", ("4", "@all"), False),
    "cnn": (DigitsCNN, images, "12MiB", ("fc2", "@all"), True),  # a convolution's kernel takes scratch memory
    "encoder": (lambda: Encoder(2, 32), tokens, "4MiB", ("@last:1", "@biases"), False),
}


@pytest.mark.parametrize("name", TRUTHS)
def test_the_batch_it_names_fits_when_run_and_the_next_does_not(name: str) -> None:
    make, inputs, memory, subsets, scratch = TRUTHS[name]
    fit = fl.fit(
        make(), inputs(3), mean_square,
        train={s: s for s in subsets}, memory=memory, sequence=False, scratch=scratch,
    )  # fmt: skip
    for row in fit:
        names = list(row.subset.names)

        def peak(count: int, names: list[str] = names) -> int:
            case = build(lambda: Case(make(), inputs(count), mean_square))
            return measure_peak(case, names, "freeze").peak_bytes

        assert peak(row.batch.size) <= fit.memory_bytes < peak(row.batch.size + 1)


def test_neighbours_are_what_the_trace_of_that_size_says() -> None:
    model, loss = mlp(), mean_square
    row = fl.fit(model, torch.rand(5, 64), loss, train="4", memory=10**6)["4"].batch
    peaks = [fl.trace(model, torch.rand(n, 64), loss).cost("4").peak_bytes for n in (row.size, row.size + 1)]
    assert [row.peak_bytes, row.next_bytes] == peaks
    assert peaks[0] <= 10**6 < peaks[1]


def test_labels_of_the_loss_grow_with_the_batch() -> None:
    x, labels = torch.rand(6, 64), torch.zeros(6, dtype=torch.int64)
    fit = fl.fit(mlp(), x, lambda out: F.cross_entropy(out, labels), train="@all", memory="1MiB")
    assert str(fit.batch) == "dimension 0 of input and loss.labels (6 as found)"
    assert fit.rows[0].batch.size > 100
    assert fit.length is None


class Positions(nn.Module):
    """Tokens with a table of 48 positions, looked up or sliced."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.tokens, self.head = nn.Embedding(100, 8), nn.Linear(8, 100)
        self.table = nn.Embedding(48, 8)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        found = self.table(torch.arange(length)) if self.how == "looked up" else self.table.weight[:length]
        return self.head(self.tokens(ids) + found)


@pytest.mark.parametrize("how", ["looked up", "sliced"])
def test_a_table_of_positions_ends_the_length_and_is_named(how: str) -> None:
    ids = torch.randint(0, 100, (2, 16))
    fit = fl.fit(
        Positions(how), ids, lambda out: F.cross_entropy(out.flatten(0, 1), ids.flatten()), train="head", memory="9MiB"
    )
    found = fit["head"].length
    assert found is not None
    assert (found.size, found.next_bytes) == (48, None)
    assert ("table has 48 positions" if how == "looked up" else "with 49 the step raises RuntimeError") in found.bound
    assert found.bound in " ".join(str(fit).split())


def test_the_memory_ends_the_length_where_nothing_else_does() -> None:
    fit = fl.fit(Encoder(2, 32), tokens(2), mean_square, train="@all", memory="2MiB")
    found = fit.rows[0].length
    assert found is not None
    assert found.next_bytes is not None
    assert found.peak_bytes <= 2 * 2**20 < found.next_bytes
    real = fl.trace(Encoder(2, 32), torch.zeros(2, found.size, dtype=torch.int64), mean_square).cost("@all")
    assert abs(real.peak_bytes - found.peak_bytes) <= 0.001 * real.peak_bytes


def test_freezing_one_thing_more_is_what_tracing_it_says() -> None:
    model = Encoder(3, 32)
    fit = fl.fit(model, tokens(2), mean_square, train="@last:2", memory="4MiB", sequence=False)
    batch = fit.rows[0].batch
    first = batch.freezing[0]
    assert first.what == "blocks.1"  # the earlier one: backward no longer goes that far
    frozen = fl.fit(model, tokens(2), mean_square, train="@last:1", memory="4MiB", sequence=False).rows[0].batch
    assert batch.size < frozen.size
    assert first.size is not None
    assert abs(first.size - frozen.size) <= 0.02 * frozen.size


def test_a_model_without_weights_fits_too() -> None:
    with torch.device("meta"):
        model = Encoder(2, 32)
    light = fl.fit(model, tokens(2), mean_square, train="@last:1", memory="4MiB", sequence=False)
    real = fl.fit(Encoder(2, 32), tokens(2), mean_square, train="@last:1", memory="4MiB", sequence=False)
    assert light.rows[0].batch.size == real.rows[0].batch.size


def test_methods_are_rows() -> None:
    fit = fl.fit(mlp(), torch.rand(2, 64), mean_square, train="6", memory="1MiB", methods=("freeze", "optimizer-only"))
    assert [row.label for row in fit] == ["6 by freeze", "6 by optimizer-only"]
    assert fit.rows[0].batch.size > fit.rows[1].batch.size


def test_values_that_decide_what_runs_are_kept() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 8)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.head(x) if bool(mask.all()) else self.head(x) * mask[:, None]

    inputs = (torch.rand(4, 8), torch.ones(4, dtype=torch.bool))
    fit = fl.fit(Masked(), inputs, mean_square, train="@all", memory="64KiB")
    assert set(fit.batch.places) == {"x", "mask"}
    assert fit.rows[0].batch.size > 100


# -- what bad input gets ----------------------------------------------------------------------------------------------


def test_too_little_memory_is_an_error_that_says_what_it_takes_and_what_to_freeze() -> None:
    with pytest.raises(
        FitError, match=r"nothing fits into 100\.00 KiB: @all needs 2\d\d\.\d\d KiB at batch 1 \(.* with"
    ):
        fl.fit(mlp(), torch.rand(2, 64), mean_square, train="@all", memory="100KiB")


def test_a_row_that_does_not_fit_beside_one_that_does_is_said() -> None:
    fit = fl.fit(mlp(), torch.rand(2, 64), mean_square, train={"head": "6", "all": "@all"}, memory="200KiB")
    assert [row.batch.size > 0 for row in fit] == [True, False]
    assert "all (everything) does not fit: batch 1 needs" in str(fit)


def test_a_batch_that_cannot_be_doubled_is_named() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 2)
            self.start = nn.Parameter(torch.zeros(3, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.start)

    with pytest.raises(
        FitError, match=r"taking dimension 0 of x \(3 as found\), with it doubled the step raises Runtime"
    ):
        fl.fit(Fixed(), torch.rand(3, 8), mean_square, train="@all", memory="1MiB")


@pytest.mark.parametrize("memory", ["24", "24 apples", "1G", -1, 0, 1.5, ""])
def test_an_unreadable_memory_is_an_error(memory: Any) -> None:
    with pytest.raises(fl.FrostlineError, match="memory"):
        fl.fit(mlp(), torch.rand(2, 64), mean_square, train="@all", memory=memory)


def test_the_caller_finds_everything_as_it_was() -> None:
    model = mlp()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = torch.random.get_rng_state()
    x = torch.rand(3, 64)
    torch.random.set_rng_state(state)
    fl.fit(model, x, mean_square, train="6", memory="1MiB")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert x.shape == (3, 64)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
        assert parameter.grad is None
