"""Seconds of a step: parts that add up, more for more work, an interval around them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tests.cases import CASES
from tests.truth.comparing import trace_case
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import frostline as fl
from frostline.costing import overhead
from frostline.costing.engine import masks
from frostline.costing.optimizers import optimizer_model
from frostline.costing.overhead import Overhead
from frostline.costing.seconds import PARTS, Clockwork
from frostline.kernels import activation, dropout, lean_kernels, replaced_ops
from frostline.kernels.bits import pack_bits
from frostline.probing import stopwatch
from frostline.probing.stopwatch import Timing, Work
from frostline.probing.timings import Timings
from frostline.tracing.calls import is_view


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROSTLINE_CACHE", "off")
    monkeypatch.setattr(stopwatch, "ROTATED_BYTES", 1 << 20)


def wide() -> fl.Trace:
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))
    return fl.trace(model, torch.randn(512, 256), loss=lambda y: y.square().mean())


def test_seconds_are_none_until_calibrated() -> None:
    trace = wide()
    assert trace.cost("@all").step_seconds is None
    trace.calibrate()
    cost = trace.cost("@all")
    assert cost.step_seconds is not None
    assert cost.seconds is not None
    assert cost.step_seconds == pytest.approx(sum(cost.seconds.by_part().values()))
    assert list(cost.seconds.by_part()) == list(PARTS)
    assert cost.seconds.low < cost.step_seconds < cost.seconds.high


def test_what_is_not_run_takes_no_time() -> None:
    trace = wide()
    trace.calibrate()
    head, first, everything = (trace.cost(train).seconds for train in ("4", "0", "@all"))
    assert head is not None
    assert first is not None
    assert everything is not None
    assert head.grad_input < first.grad_input  # (the loss has a gradient of its own in any case)
    assert 0 < head.grad_weight < everything.grad_weight
    assert head.total < first.total < everything.total
    assert head.forward == first.forward == everything.forward


def test_the_methods_differ_by_what_they_run() -> None:
    trace = wide()
    trace.calibrate()
    found = {method: trace.cost("4", method=method).seconds for method in ("freeze", "optimizer-only")}
    frozen, owned = found["freeze"], found["optimizer-only"]
    assert frozen is not None
    assert owned is not None
    assert owned.grad_input > frozen.grad_input
    assert owned.optimizer == frozen.optimizer  # the same parameters step


def test_only_what_the_rows_need_is_timed() -> None:
    trace = wide()
    few = trace.calibrate([trace.cost("4")]).num_timed
    assert 0 < few < wide().calibrate().num_timed
    assert wide().calibrate([]).num_timed < few  # (the overhead alone)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["lstm_classifier", "checkpoint_each_block", "custom_op", "hooks", "attention_causal"])
def test_every_kind_of_call_can_be_timed(name: str) -> None:
    trace = trace_case(CASES[name]())
    assert trace.calibrate().failed == {}
    seconds = trace.cost("@all").seconds
    assert seconds is not None
    assert seconds.unknown == {}
    assert seconds.forward > 0
    assert seconds.grad_weight > 0


def test_timing_leaves_the_model_alone() -> None:
    case = CASES["batch_norm_cnn_train"]()
    before = {name: tensor.clone() for name, tensor in case.model.state_dict().items()}
    trace = trace_case(case)
    trace.calibrate()
    assert trace.cost("@all").step_seconds is not None
    assert all(torch.equal(tensor, before[name]) for name, tensor in case.model.state_dict().items())
    assert all(p.grad is None for p in case.model.parameters())


def test_a_backward_runs_what_torch_runs_and_nothing_of_the_probes_own() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    x = torch.randn(3, 4)
    cost = fl.trace(model, x, loss="sum").cost("@all")
    ledger, *flags = cost._flags
    live, wanted = ledger.flags(*flags)
    ours: Counter[str] = Counter()
    for unit in ledger.units:
        mask, needed = masks(*ledger.unit_flags(unit, live, wanted))
        if mask and unit.held:
            ours.update(str(op.op) for op in ledger.probe(unit, mask, needed).backward if not is_view(op.op))
    real: Counter[str] = Counter()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not is_view(op):
                real[str(op)] += 1
            return op(*args, **(kwargs or {}))

    loss = model(x).sum()
    with Watch():
        loss.backward()
    del real["aten.ones_like.default"]  # (where the backward of the whole step begins)
    assert ours == real


class Mixes(nn.Module):
    """Gradients come back transposed, expanded and sliced; two meet."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.channels, self.norm = nn.Linear(6, 6), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        y_BCT = torch.relu(self.tokens(self.norm(self.channels(x_BTC)).transpose(1, 2)))
        return self.channels(y_BCT.transpose(1, 2) + x_BTC)[:, 0].sum(1)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.qkv(x_BTC).chunk(3, -1))
        weights = (q @ k.transpose(-1, -2)).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    "model",
    [
        Mixes(),
        Attends(),
        nn.Sequential(
            nn.Conv1d(6, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(12, 2)
        ),
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
    ],
    ids=["mixes", "attends", "convolves", "encodes"],
)
def test_gradients_come_as_they_do_in_a_real_backward(model: nn.Module) -> None:
    """Their shapes and strides, as the nodes of a real step are given them."""
    inputs = torch.randn(4, 6, 8)
    ledger = fl.trace(model, inputs, torch.mean)._coster.ledger
    strides = Clockwork(ledger, Timings(torch.device("cpu")), Overhead(0.0, 0.0, 0.0, 0.0))._strides
    found: Counter[Any] = Counter()
    for unit in ledger.units:
        if unit.held and any(unit.behind):
            given = {number: slot.meta.stride for number, slot in enumerate(unit.outputs)} | dict(strides.get(unit, ()))
            found.update((unit.outputs[number].meta.shape, given[number]) for number in unit.receives)
    expected: Counter[Any] = Counter()
    loss = model(inputs).mean()
    stack, seen = [loss.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen or (hasattr(node, "variable") and not node.next_functions):
            continue
        seen.add(node)
        node.register_prehook(lambda gs: expected.update((tuple(g.shape), g.stride()) for g in gs if g is not None))
        stack += [below for below, _ in node.next_functions]
    loss.backward()
    assert strides or not isinstance(model, Mixes | Attends)
    assert found <= expected  # (some calls are of several nodes)


def test_memory_from_the_system_is_paid_for_the_largest_blocks_alone() -> None:
    model = nn.Sequential(nn.Linear(64, 4096), nn.Linear(4096, 64), nn.Linear(64, 64))
    trace = fl.trace(model, torch.randn(2, 64), loss="sum")
    cost = trace.cost("@all")
    parameters = trace.parameter_list
    clockwork = Clockwork(cost._flags[0], Timings(torch.device("cpu")), Overhead(0.0, 0.0, fresh=1.0))
    assert clockwork._largest(parameters) == [model[0].weight, model[1].weight]
    assert clockwork._largest([model[2].bias]) == []  # (an activation is larger)
    kept = Clockwork(cost._flags[0], clockwork.timings, Overhead(0.0, 0.0))
    flags = cost._flags[1:]
    adamw = optimizer_model("adamw")
    paid, free = (work.step(*flags, dict(enumerate(parameters)), [], adamw) for work in (clockwork, kept))
    nbytes = 2 * model[0].weight.nbytes
    assert paid.optimizer - free.optimizer == pytest.approx(2 * nbytes, abs=1)
    assert paid.grad_weight - free.grad_weight == pytest.approx(nbytes, abs=1)


@pytest.mark.parametrize("train", ["@all", "0", "6.bias", "@head"])
def test_packing_takes_time_for_what_a_run_packs(monkeypatch: pytest.MonkeyPatch, train: str) -> None:
    """A ReLU before a linear layer that trains is kept as it is, and one before a frozen layer as bits."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Hardtanh(0, 6, inplace=True), nn.Dropout(0.3),
        nn.Flatten(), nn.Linear(16, 8), nn.ReLU6(), nn.Linear(8, 2),
    )  # fmt: skip
    x = torch.randn(5, 3, 6, 6)
    trace = fl.trace(model, x, loss="sum")
    packed: list[int] = []

    def counting(tensor: torch.Tensor, condition: Any) -> torch.Tensor:
        packed.append(tensor.numel())
        return pack_bits(tensor, condition)

    cost = trace.cost(train, method="train-only")
    ledger = cost._flags[0]
    clockwork = Clockwork(ledger, Timings(torch.device("cpu")), Overhead(0.0, 0.0, packing=1.0))
    with fl.train_only(model, train=train):
        model(x).sum().backward()  # (whatever the first step finds out)
        for module in (activation, dropout):
            monkeypatch.setattr(module, "pack_bits", counting)
        model(x).sum().backward()
    assert clockwork.packing(cost._sums.held) == sum(packed)
    frozen = trace.cost(train)
    plain = Clockwork(frozen._flags[0], clockwork.timings, clockwork.overhead)
    assert plain.packing(frozen._sums.held) == 0


class Accelerator:
    """Timings of one, where every op takes as long."""

    device = torch.device("cuda")

    def __init__(self, seconds: float, host_seconds: float) -> None:
        self.timing = Timing(seconds, 0.0, 0, host_seconds=host_seconds)

    def get(self, work: Work) -> Timing:
        return self.timing

    def get_other(self, *_how: object, **_more: object) -> Timing:
        return self.timing

    def known(self, work: Work) -> bool:
        return True


@pytest.mark.parametrize(("device", "host"), [(1.0, 0.0), (1.0, 0.5), (1.0, 2.0), (0.0, 1.0)])
def test_an_accelerator_waits_for_the_host_or_the_host_for_it(device: float, host: float) -> None:
    trace = wide()
    cost = trace.cost("@all")
    ledger, *flags = cost._flags
    overhead = Overhead(forward=3.0, backward=0.0, optimizer=7.0)
    clockwork = Clockwork(ledger, Accelerator(device, host), overhead)  # type: ignore[arg-type]
    tally = clockwork.tally(*flags)
    found = clockwork.step(*flags, dict(enumerate(trace.parameter_list)), [], optimizer_model("adamw"))
    num_parameters = len(trace.parameter_list)
    there = [device * tally.forward_ops, device * tally.backward_ops, device * num_parameters]
    here = [(host + 3) * tally.forward_ops, host * tally.backward_ops, host * num_parameters + 7]
    queued = 0.0
    for given, takes in zip(here, there, strict=True):  # (each part all at once, when the host has handed it over)
        queued = max(queued, sum(here[: here.index(given)])) + takes
    assert found.total == pytest.approx(max(queued, sum(here)))
    assert found.forward == there[0]
    assert found.overhead >= 0


def test_what_lean_kernels_take_to_be_called_is_counted_where_they_run() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    trace = fl.trace(model, torch.randn(3, 2, 8), loss="sum")
    kept = {train: trace.cost(train, method="train-only") for train in ("@all", "0.bias", "5")}
    numbers = {}
    for train, cost in kept.items():
        clockwork = Clockwork(cost._flags[0], Accelerator(1.0, 0.0), Overhead(0.0, 0.0))  # type: ignore[arg-type]
        with lean_kernels() as run:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in cost.subset.names)
            model(torch.randn(3, 2, 8)).sum()
        numbers[train] = run.num_replaced
        tally = clockwork.tally(*cost._flags[1:])
        assert tally.lean_ops == run.num_replaced, train
        with Names() as ran:
            model(torch.randn(3, 2, 8)).sum()
        assert tally.passing_ops == sum(name in replaced_ops() for name in ran.names) > 0, train
        frozen, *flags = trace.cost(train)._flags
        assert Clockwork(frozen, Accelerator(1.0, 0.0), Overhead(0.0, 0.0)).tally(*flags).passing_ops == 0  # type: ignore[arg-type]
    assert numbers["5"] == 0 < numbers["@all"]


class Names(TorchDispatchMode):
    """The ops that run, by schema name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_lean_kernels_are_timed_with_other_data_read_before_each_layer_and_after_its_backward() -> None:
    ran: list[str] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ran.append(func.name())
            return func(*args, **(kwargs or {}))

    layer = overhead._AsInAStep(nn.ReLU(), torch.ones(3))
    x = torch.ones(1, 2, 8, requires_grad=True)
    with Record():
        layer(x).backward(torch.ones(1, 2, 8))
    of_interest = [name for name in ran if name in ("aten::sum", "aten::relu", "aten::threshold_backward")]
    assert of_interest == ["aten::sum", "aten::relu", "aten::threshold_backward", "aten::sum"]
    frozen = overhead._AsInAStep(nn.ReLU(), torch.ones(3))(torch.ones(2))
    assert not frozen.requires_grad
