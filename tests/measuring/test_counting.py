"""FLOPs and saved bytes of a real step against what the trace says: two paths, one number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.cases import CASES
from tests.measuring.networks import inputs, mlp, squares
from torch import nn

import frostline as fl
from frostline.measuring.case import Case
from frostline.measuring.counting import Counts, count
from frostline.measuring.loop import Loop


def counts_of(loop: Loop, cost: fl.Cost) -> Counts:
    loop.arrange(Case.of(cost.subset, cost.method, "sgd"))
    loop.step(lambda phase, loss: None)
    return count(loop)


def test_counts_of_an_mlp_are_what_paper_says():
    first, second = 2 * 8 * 16 * 32, 2 * 8 * 32 * 4
    loop = Loop(mlp(), inputs(), squares)
    counts = counts_of(loop, fl.trace(mlp(), inputs(), squares).cost("2.weight"))
    assert (counts.forward_flops, counts.backward_flops) == (first + second, second)
    assert counts.saved_bytes == 8 * 32 * 4 + 8 * 4 * 4  # the input of the last layer, and its output
    assert counts.uncounted == ()


@pytest.mark.parametrize(
    "name", ["mnist_cnn", "transformer_encoder_train", "input_requires_grad", "constant_attribute", "gru_bidirectional"]
)
@pytest.mark.parametrize("method", ["freeze", "optimizer-only", "train-only"])
def test_counts_are_the_traces(name: str, method: str):
    case = CASES[name]()
    trace = fl.trace(case.model, case.inputs, case.loss)
    last = list(trace.parameters)[len(trace.parameters) // 2 :]
    cost = trace.cost(last, method=method, optimizer="sgd")
    loop = Loop(case.model, case.inputs, case.loss)
    counts = counts_of(loop, cost)
    loop.close()
    assert counts.forward_flops == cost.forward_flops
    assert counts.backward_flops == cost.backward_flops
    assert counts.saved_bytes == cost.saved_bytes


def test_what_stands_in_for_an_unread_tensor_takes_no_memory():
    case = CASES["mnist_cnn"]()
    loop = Loop(case.model, case.inputs, case.loss)
    first = next(iter(loop.parameters))
    found = {}
    for method in ("freeze", "train-only"):
        loop.arrange(Case.of((first,), method, "sgd"))
        loop.step(lambda phase, loss: None)
        found[method] = sum(count(loop).other.values())
    loop.close()
    assert found["train-only"] == found["freeze"]


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(self.first(x).relu())


def test_a_compiled_model_is_counted_as_eager_and_still_compiled_afterwards():
    runs = []

    def backend(graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            runs.append(args)
            return graph(*args)

        return run

    model = Own()
    cost = fl.trace(Own(), inputs(), squares).cost("last.weight")
    model.compile(backend=backend)
    loop = Loop(model, inputs(), squares)
    counts = counts_of(loop, cost)
    assert (counts.forward_flops, counts.backward_flops) == (cost.forward_flops, cost.backward_flops)
    assert counts.saved_bytes is None
    before = len(runs)
    assert before > 0
    loop.step(lambda phase, loss: None)
    assert len(runs) == before + 1
