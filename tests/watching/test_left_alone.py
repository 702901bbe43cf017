"""What a script may do that our looking must not break, nor change."""

from __future__ import annotations

import gc
import textwrap
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.watching.watching import only, plainly, watched, write
from torch import nn

import frostline as fl
from frostline.watching.script import Script

HEAD = """
import torch
from torch import nn

torch.manual_seed(0)
"""

STEPS = """
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    optimizer.zero_grad()
    model(inputs).pow(2).mean().backward()
    optimizer.step()
"""

HOOKS = """
model, inputs = nn.Sequential(nn.Linear(4, 3), nn.PReLU()), torch.randn(2, 4)
for parameter in model.parameters():
    parameter.register_hook(lambda gradient: gradient.clamp(-1, 1))
"""

SPARSE_GRADIENTS = """
model, inputs = nn.Sequential(nn.Embedding(8, 4, sparse=True), nn.Linear(4, 2)), torch.tensor([1, 2])
model[0].weight.register_hook(lambda gradient: gradient * 0.5)
"""


def assert_trains(folder: Path, source: str) -> None:
    """The script ends well, and everything in it was looked at."""
    seen, ended = watched(write(folder, source))
    assert (ended.code, ended.how) == (0, "end")
    assert [note for note in seen.notes if "not seen" in note] == []
    assert str(seen)


@pytest.mark.parametrize("source", [HOOKS, SPARSE_GRADIENTS], ids=["vectors", "sparse"])
def test_a_gradient_hook_may_be_on_any_parameter(tmp_path: Path, source: str) -> None:
    assert_trains(tmp_path, HEAD + source + STEPS)


BUFFERS = """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("mask", torch.ones(6, dtype=torch.bool))
        self.register_buffer("links", torch.eye(6).to_sparse())
        self.register_buffer("small", torch.ones(6).to(torch.float8_e4m3fn))
        self.register_buffer("nowhere", torch.empty(6, device="meta"))
        self.register_buffer("turned", torch.ones(6, dtype=torch.complex64))
    def forward(self, x):
        self.mask[0] = False
        self.turned *= 1j
        return torch.sparse.mm(self.links, self.linear(x)).masked_fill(self.mask, 0.0)

model, inputs = Model(), torch.randn(6, 6)
"""

FAKE = """
from torch._subclasses import FakeTensorMode

with FakeTensorMode():
    fake = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    fake(torch.randn(2, 4)).sum().backward()
model, inputs = nn.Linear(4, 3), torch.randn(2, 4)
"""

FROZEN_NORM = """
model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=None), nn.Linear(3, 2))
model[:2].requires_grad_(False)
model[1].num_batches_tracked = None
inputs = torch.randn(5, 4)
"""


@pytest.mark.parametrize("source", [BUFFERS, FAKE], ids=["buffers", "fake"])
def test_parameters_and_buffers_may_be_of_any_kind(tmp_path: Path, source: str) -> None:
    assert_trains(tmp_path, HEAD + source + STEPS)


def test_how_far_a_buffer_moved_is_known_where_it_can_be(tmp_path: Path) -> None:
    seen, _ = watched(write(tmp_path, HEAD + BUFFERS + STEPS))
    most = {buffer.name: buffer.most for buffer in seen.record.models[0].buffers}
    assert (most["mask"], most["small"], most["links"], most["nowhere"]) == (1.0, 0.0, None, None)
    assert most["turned"] == pytest.approx(2**0.5)  # 1 -> 1j -> -1 -> -1j


def test_a_frozen_norm_whose_statistics_cannot_be_compared_is_found_all_the_same(tmp_path: Path) -> None:
    end = "\nmodel[1].running_mean, model[1].running_var = torch.ones(3, 1), torch.ones(3, 1)\n"
    seen, _ = watched(write(tmp_path, HEAD + FROZEN_NORM + STEPS + end))
    assert "by up to" not in only(seen, "frozen-norm-drift").evidence[0]


def test_a_storage_can_still_be_resized(tmp_path: Path) -> None:
    source = "model, inputs = nn.Linear(4, 3), torch.randn(2, 4)"
    end = (
        "\nstorage = model.weight.untyped_storage()\nsize = storage.nbytes()\nstorage.resize_(0)\nstorage.resize_(size)"
    )
    assert_trains(tmp_path, HEAD + source + STEPS + end)


def test_the_default_device_may_change_at_any_time(tmp_path: Path) -> None:
    source = """
model = nn.Linear(4, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
torch.set_default_device("cpu")
for _ in range(2):
    out = model(torch.randn(2, 4))
    torch.set_default_device("cpu")
    with torch.device("cpu"):
        loss = out.pow(2).mean()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        model(torch.randn(2, 4))
    torch.set_default_device(None)
"""
    assert_trains(tmp_path, HEAD + source)


META = """
with torch.device("meta"):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
model(torch.empty(2, 4, device="meta"))
model.to_empty(device="cpu")
for module in model:
    module.reset_parameters()
inputs = torch.randn(2, 4)
"""


def test_a_model_is_looked_at_once_it_is_in_memory(tmp_path: Path) -> None:
    assert_trains(tmp_path, HEAD + META + STEPS)
    seen, _ = watched(tmp_path / "train.py")
    assert all(fact.owners and fact.moved for _, fact in seen.record.facts())


MODES = """
from torch.utils._python_dispatch import TorchDispatchMode

class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen.append(str(op))
        return op(*args, **(kwargs or {}))

model = nn.Sequential(nn.Linear(64, 600), nn.ReLU(), nn.Linear(600, 600), nn.BatchNorm1d(600), nn.Linear(600, 2))
model[:3].requires_grad_(False)
model[4].weight.register_hook(lambda gradient: gradient * (torch.arange(2) == 0)[:, None])
inputs, names = torch.randn(4, 64), Names()
with names:
"""


def test_the_modes_of_the_script_see_nothing_of_ours(tmp_path: Path) -> None:
    path = write(tmp_path, HEAD + MODES + textwrap.indent(STEPS, "    "))
    script = Script(str(path), [])
    with fl.watch(values=True):
        script.run(lambda: None)
    assert script._main.names.seen == plainly(path)["names"].seen


IN_A_THREAD = """
import threading

model, over = nn.Linear(4, 3), threading.Event()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

def train():
    for _ in range(50):
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
    over.set()

thread = threading.Thread(target=train)
thread.start()
"""


@pytest.mark.parametrize("end", ["over.wait()", "thread.join()", ""], ids=["event", "join", "nothing"])
def test_enough_in_a_thread_ends_the_script(tmp_path: Path, capfd: pytest.CaptureFixture[str], end: str) -> None:
    hook = threading.excepthook
    seen, ended = watched(write(tmp_path, HEAD + IN_A_THREAD + end), steps=3)
    assert (ended.code, ended.how, seen.record.num_steps) == (0, "enough", 3)
    assert capfd.readouterr().err == ""
    assert threading.excepthook is hook


def test_other_errors_of_threads_are_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[type[BaseException]] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: errors.append(args.exc_type))
    source = "import threading\nthread = threading.Thread(target=lambda: 1 / 0)\nthread.start()\nthread.join()\n"
    _, ended = watched(write(tmp_path, source))
    assert (ended.how, errors) == ("end", [ZeroDivisionError])


IN_A_FUNCTION = """
import gc, weakref

def train(rate=0.1, seed=3):
    model, first = nn.Linear(4, 3), torch.zeros(())
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(2):
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
    model.eval()
    gone = weakref.ref(first)
    del first
    return gone()

def named(rate=0.1, seed=3):
    settings = locals()
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(2):
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
    return settings

kept, settings = train(), named()
"""


def test_the_variables_of_a_function_are_its_own(tmp_path: Path) -> None:
    """Before Python 3.13 looking at them fills the dict of ``locals()``, and holds what the function lets go of."""
    script = Script(str(write(tmp_path, HEAD + IN_A_FUNCTION)), [])
    with fl.watch() as seen:
        script.run(lambda: None)
    assert script._main.settings == {"rate": 0.1, "seed": 3}
    assert script._main.kept is None
    assert [model.variable for model in seen.record.models] == ["model", ""]


def test_optimizers_of_models_that_are_not_looked_at_are_freed() -> None:
    alive: list[weakref.ref[Any]] = []
    with fl.watch() as seen:
        for _ in range(12):
            model = nn.Linear(4, 3)
            optimizer = torch.optim.Adam(model.parameters())
            for _ in range(2):
                optimizer.zero_grad()
                model(torch.ones(2, 4)).pow(2).mean().backward()
                optimizer.step()
            alive.append(weakref.ref(optimizer))
        del model, optimizer
        gc.collect()
        assert [ref() is not None for ref in alive] == [True] * 8 + [False] * 4
    assert [fact.steps for fact in seen.record.optimizers] == [2] * 12
    assert {fact.kind for fact in seen.record.optimizers} == {"Adam"}
    assert not seen.findings


FAILS = """
model = nn.Linear(4, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
try:
    nn.functional.cross_entropy(model(torch.randn(2, 4)), torch.tensor([0, 1, 2]))
except ValueError:
    model(torch.randn(2, 4)).backward()
"""


def test_no_frame_of_ours_is_in_a_traceback(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _, ended = watched(write(tmp_path, HEAD + FAILS))
    printed = capfd.readouterr().err
    assert ended.how == "error"
    assert "During handling of the above exception" in printed
    assert "watching" not in printed
    assert printed.count("train.py") == 2
