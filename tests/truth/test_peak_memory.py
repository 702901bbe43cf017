"""The predicted peak against the allocator's own events, at sizes where a few odd bytes are small change."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from tests.cases import CASES, Case, build
from tests.truth.allocator import measure_peak
from tests.truth.comparing import trace_case
from tests.truth.reference import METHODS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from frostline.probing import stopwatch
from frostline.tracing.trace import Trace

pytestmark = pytest.mark.filterwarnings("ignore")


def square(out: Tensor) -> Tensor:
    return out.square().mean()


class Encoder(nn.Module):
    """Two transformer layers over embedded ids, a classifier on the first position; or each under a checkpoint."""

    def __init__(self, *, checkpointed: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(500, 64)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(64, 4, 256, 0.1, batch_first=True) for _ in range(3))
        self.head = nn.Linear(64, 500)
        self.checkpointed = checkpointed

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTD = self.embedding(ids_BT)
        for layer in self.layers:
            x_BTD = checkpoint(layer, x_BTD, use_reentrant=False) if self.checkpointed else layer(x_BTD)
        logits: Tensor = self.head(x_BTD)
        return logits


class Stages(nn.Module):
    """A CNN with a skip, norms, pooling and in-place activations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.deep = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.out = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, 2, 1), nn.GELU(), nn.AdaptiveAvgPool2d(2))
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        logits: Tensor = self.head(self.out(x + self.deep(x)).flatten(1))
        return logits


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm, self.head = nn.Embedding(300, 48), nn.LSTM(48, 64), nn.Linear(64, 300)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(self.embedding(ids))[0])
        return logits


class Tied(nn.Module):
    """The gradients of embedding and head meet; to the first, which is a view, autograd adds nothing in place."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle = nn.Embedding(3000, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 3000, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.middle(self.embedding(ids)))
        return logits


def built(make: Callable[[], tuple[nn.Module, Tensor]]) -> Case:
    return build(lambda: Case(*make(), square))


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "encoder": lambda: (Encoder(checkpointed=False), torch.randint(0, 500, (8, 48))),
    "checkpointed": lambda: (Encoder(checkpointed=True), torch.randint(0, 500, (8, 48))),
    "cnn": lambda: (Stages(), torch.randn(4, 3, 48, 48)),
    "lstm": lambda: (Reader(), torch.randint(0, 300, (32, 16))),
    "tied": lambda: (Tied(), torch.randint(0, 3000, (1, 8))),
    "mlp": lambda: (nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 64)), torch.randn(128, 64)),
}
ALLOWED = {"cnn": 0.03}  # else 0.01
PACKING = {"cnn": 0.07}  # by train-only: what packing takes for a moment (a pool's indices, most) is not predicted


def calibrated(case: Case, monkeypatch: pytest.MonkeyPatch) -> Trace:
    """Each kernel run a few times only: what is wanted of it is its scratch."""
    monkeypatch.setenv("FROSTLINE_CACHE", "off")
    monkeypatch.setattr(stopwatch, "ROTATED_BYTES", 1 << 20)
    monkeypatch.setattr(stopwatch, "MOST_SAMPLES", 1)
    trace = trace_case(case)
    trace.calibrate()
    return trace


@pytest.mark.parametrize("name", NETWORKS)
def test_the_peak_is_the_allocators(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = built(NETWORKS[name])
    trace = calibrated(case, monkeypatch)
    names = list(trace.parameters)
    rng = random.Random(name)
    subsets = [names, names[-2:], names[len(names) // 2 :], *(rng.sample(names, 2) for _ in range(2))]
    for subset in subsets:
        for method in METHODS:
            cost = trace.cost(subset, method=method)
            real = measure_peak(case, subset, method)
            off = abs(cost.peak_bytes / real.peak_bytes - 1)
            allowed = PACKING if method == "train-only" else ALLOWED
            assert off <= allowed.get(name, 0.01), (subset, method, cost.peak, real.peak_bytes)
            assert sum(cost.peak_by_kind.values()) == cost.peak_bytes


def test_a_convolution_needs_memory_that_only_its_kernel_knows_of(monkeypatch: pytest.MonkeyPatch) -> None:
    case = built(NETWORKS["cnn"])
    before = trace_case(case).cost("@all")
    after = calibrated(case, monkeypatch).cost("@all")
    assert before.peak_by_kind["scratch"] < after.peak_by_kind["scratch"]
    assert before.peak_bytes < after.peak_bytes


def test_every_moment_of_a_step_is_in_order_and_the_peak_is_the_fullest() -> None:
    cost = trace_case(CASES["resnet18"]()).cost("@all")
    moments = cost.memory_timeline()
    phases = list(dict.fromkeys(moment.phase for moment in moments))
    assert phases == ["forward", "backward", "optimizer"]
    assert max(moment.nbytes for moment in moments) == cost.peak_bytes
    assert all(nbytes >= 0 for moment in moments for nbytes in moment.by_kind.values())


def test_a_step_run_as_a_whole_has_a_peak_too() -> None:
    case = CASES["mlp"]()
    trace = trace_case(case)
    simulated = trace.cost("@all").peak_bytes
    trace.entangled = "the test says so"
    assert abs(trace.cost("@all").peak_bytes / simulated - 1) < 0.1
