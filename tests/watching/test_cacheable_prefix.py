"""``cacheable-prefix``: its figures are what torch runs and what a cache holds; all bits of a sample count."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.watching.look_alikes import HEAD
from tests.watching.watching import found, mended, only, plainly, watched, write
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import frostline as fl
from frostline.watching.samples import Samples

SHUFFLED = """
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
body = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
model = nn.Sequential(body, nn.Linear(16, 5)).eval()
body.requires_grad_(False)
data = DataLoader(TensorDataset(torch.randn(12, 3, 9, 9), torch.randint(5, (12,))), batch_size=4, shuffle=True)
optimizer = torch.optim.Adam(model[1].parameters())
counts = []
for _ in range(3):
    for x, y in data:
        with FlopCounterMode(display=False) as counter:
            loss = F.cross_entropy(model(x), y)
        counts.append(counter.get_total_flops())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
"""


def test_the_figures_are_what_torch_runs_and_what_the_cache_holds(tmp_path: Path) -> None:
    path = write(tmp_path, HEAD + SHUFFLED)
    seen, _ = watched(path)
    finding = only(seen, "cacheable-prefix")
    assert finding.now is not None
    assert finding.fixed is not None
    before, after = plainly(path), plainly(mended(path, finding))
    assert set(before["counts"]) == {finding.now.forward_flops}
    assert set(after["counts"][3:]) == {finding.fixed.forward_flops}  # from the second epoch on
    held = sum(each.numel() * each.element_size() for each in after["kept"].values())
    assert held == 12 * 16 * 4
    assert any("64 bytes a sample, 768 B for all that were seen" in each for each in finding.evidence)
    assert any(each.startswith("36 samples were trained on, 12 of them different") for each in finding.evidence)
    for name, weight in before["model"].state_dict().items():
        torch.testing.assert_close(after["model"].state_dict()[name], weight)
    assert seen.fixed == finding.fixed


def test_what_is_computed_once_is_not_found(tmp_path: Path) -> None:
    path = write(tmp_path, HEAD + SHUFFLED)
    again, _ = watched(mended(path, only(watched(path)[0], "cacheable-prefix")))
    assert found(again) == []


def in_steps(model: nn.Module, steps: int, loss_of: Any) -> fl.watching.watch.Watch:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with fl.watch() as seen:
        for _ in range(steps):
            optimizer.zero_grad()
            loss_of().backward()
            optimizer.step()
    return seen


class Deep(nn.Module):
    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 256), nn.Linear(256, 256), nn.Linear(256, 4)
        self.between = between
        self.first.requires_grad_(False)
        self.second.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.between(self.first(x).repeat(1, 1))))


@pytest.mark.parametrize("between", [nn.Dropout(0.5), nn.BatchNorm1d(256, affine=False, track_running_stats=False)])
def test_the_prefix_ends_where_chance_or_other_samples_come_in(between: nn.Module) -> None:
    """Only the first layer is the same each time: too little to be told."""
    model, inputs = Deep(between), torch.randn(6, 8)
    assert "cacheable-prefix" not in found(in_steps(model, 4, lambda: model(inputs).sum()))
    model.eval()
    if isinstance(between, nn.Dropout):
        finding = only(in_steps(model, 4, lambda: model(inputs).sum()), "cacheable-prefix")
        assert finding.modules == ("first", "second")
        assert finding.fix.code.startswith("# Run first, second once a sample")


def test_layers_of_a_transformer_count_as_torch_counts_them() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=128, num_labels=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).train()
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[:3].requires_grad_(False)
    tokens, labels = torch.randint(50, (4, 10)), torch.randint(2, (4,))
    seen = in_steps(model, 4, lambda: model(input_ids=tokens, labels=labels).loss)
    finding = only(seen, "cacheable-prefix")
    assert finding.modules == tuple(f"bert.encoder.layer.{n}" for n in range(3))
    counter = FlopCounterMode(display=False)
    with counter:
        model(input_ids=tokens, labels=labels)
    layers = counter.get_flop_counts()
    # (Torch's counter has nothing for attention on a CPU: two products of 10 x 10 x 64, in each of 4 samples.)
    layer = sum(layers["BertForSequenceClassification.bert.encoder.layer.3"].values()) + 2 * 2 * 4 * 10 * 10 * 64
    assert finding.now is not None
    assert finding.fixed is not None
    assert finding.now.forward_flops - finding.fixed.forward_flops == 3 * layer  # every layer does the same
    assert any(f"{10 * 64 * 4:,} bytes a sample" in each for each in finding.evidence)


# -- checksums ---------------------------------------------------------------------------------------------------------


def batches() -> Iterator[Tensor]:
    yield torch.randn(5, 3, 4)
    yield torch.randn(5, 3, 4, dtype=torch.float64)
    yield torch.randn(5, 12).to(torch.bfloat16)
    yield torch.randint(100, (5, 7))
    yield torch.rand(5, 4) > 0.5
    yield torch.randn(5, 3, dtype=torch.complex64)
    yield torch.randn(4, 5, 3).transpose(0, 1)


@pytest.mark.parametrize("batch", list(batches()), ids=lambda batch: str(batch.dtype))
def test_a_sample_has_one_checksum_wherever_it_stands(batch: Tensor) -> None:
    samples, order = Samples(), torch.tensor([3, 1, 4, 0, 2])
    state = torch.get_rng_state()
    one = samples._checksums([batch])
    other = samples._checksums([batch[order]])
    assert one is not None
    assert other is not None
    assert torch.equal(one[order], other)
    assert one.dtype == torch.int64
    assert len(one.unique()) == len({tuple(sample.flatten().tolist()) for sample in batch})
    assert torch.equal(torch.get_rng_state(), state)


def test_the_last_bit_of_one_number_is_told() -> None:
    samples, batch = Samples(), torch.rand(4, 100)
    other = batch.clone()
    other[2, 57] = torch.nextafter(other[2, 57], torch.tensor(2.0))
    one, two = samples._checksums([batch]), samples._checksums([other])
    assert one is not None
    assert two is not None
    assert (one != two).tolist() == [False, False, True, False]


def test_every_tensor_counts_also_those_of_no_sample() -> None:
    samples, batch = Samples(), torch.rand(4, 6)
    marks = [samples._checksums([batch, other]) for other in (torch.ones(4), torch.zeros(4), torch.ones(3))]
    assert len({tuple(each.tolist()) for each in marks if each is not None}) == 3
    assert samples._checksums([torch.ones(3).to_sparse()]) is None
    assert samples._checksums([torch.tensor(3.0)]) is None


def test_samples_of_one_step_are_counted_once() -> None:
    """Two passes over one batch in every step, as sharpness-aware optimizers make them, are no second epoch."""
    model, seen_batches = Deep(nn.Identity()), [torch.randn(6, 8) for _ in range(5)]
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    with fl.watch() as seen:
        for batch in seen_batches:
            for _ in range(2):
                optimizer.zero_grad()
                F.mse_loss(model(batch), torch.zeros(6, 4)).backward()
            optimizer.step()
    (fact,) = seen.record.samples.values()
    assert (fact.total, fact.different) == (30, 30)
    assert found(seen) == []
