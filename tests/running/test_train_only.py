"""fl.train_only: what trains, what stays, and that all of it is undone."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
from typing import Any

import pytest
import torch
from tests.running.small import batch, loss_of, network, state, wiring
from torch import Tensor, nn

import frostline as fl
from frostline.errors import FrostlineWarning, RunError, SubsetError
from frostline.kernels import kernels_active

SUBSETS = ["8", "3", "1", "0.weight", "*.bias", "@all", "@last:1"]


@pytest.mark.parametrize("subset", SUBSETS)
def test_five_steps_move_the_subset_as_plain_pytorch_does_and_nothing_else(subset: str):
    model, plain = network(), network()
    before = state(model)
    with fl.train_only(model, subset) as run:
        names = [name for name, _ in run.named_parameters()]
        optimizer = torch.optim.AdamW(run.parameters(), lr=0.1, weight_decay=0.1)
        torch.manual_seed(2)
        for _ in range(5):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
        frozen_modules = run.frozen_modules
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name in names)
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    torch.manual_seed(2)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(plain).backward()
        optimizer.step()
    expected = state(plain)
    for name, tensor in state(model).items():
        if name in before and (name.rpartition(".")[0] in frozen_modules and name not in names):
            assert torch.equal(tensor, before[name]), name
        else:
            assert torch.equal(tensor, expected[name]), name
    assert all(not torch.equal(state(model)[name], before[name]) for name in names)
    assert {name for name, _ in plain.named_parameters() if not torch.equal(before[name], expected[name])} == set(names)


def test_gradients_are_bitwise_those_of_flags_set_by_hand():
    model, plain = network(), network()
    with fl.train_only(model, "0"):
        torch.manual_seed(3)
        loss_of(model).backward()
        got = {name: p.grad for name, p in model.named_parameters()}
    for name, p in plain.named_parameters():
        p.requires_grad_(name.startswith("0."))
    torch.manual_seed(3)
    loss_of(plain).backward()
    for name, p in plain.named_parameters():
        assert (p.grad is None) == (got[name] is None)
        assert p.grad is None or torch.equal(p.grad, got[name])


# -- undone ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subset", ["8", "0.weight", "@all"])
def test_leaving_puts_everything_back(subset: str):
    model = network()
    loss_of(model).backward()
    model[0].bias.requires_grad_(False)
    model[3].eval()
    before = wiring(model)
    with fl.train_only(model, subset):
        loss_of(model).backward()
        assert wiring(model) != before
    assert wiring(model) == before


def test_an_exception_in_the_block_undoes_it_and_goes_on():
    model = network()
    before = wiring(model)
    with pytest.raises(ZeroDivisionError), fl.train_only(model, "8"):
        raise ZeroDivisionError
    assert wiring(model) == before


class _Breaks(nn.Module):
    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


class _Around(nn.BatchNorm2d):
    """A norm with a module inside that raises, so that the exception passes through a guarded call."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__(3)
        self.inner = _Breaks(error)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(super().forward(x))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_a_frozen_modules_forward_leaves_its_own_buffers_in_place(error: type[BaseException]):
    model = nn.Sequential(_Around(error), nn.Flatten(), nn.Linear(192, 2))
    before, values = wiring(model), state(model)
    run = fl.train_only(model, "2")
    for _ in range(2):
        with pytest.raises(error):
            loss_of(model)
    if error is ValueError:  # an interrupt is put right at the end of the run
        assert wiring(model)["buffers"] == before["buffers"]
    run.close()
    assert wiring(model) == before
    assert all(torch.equal(tensor, values[name]) for name, tensor in state(model).items())


def test_a_run_that_cannot_begin_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch):
    model = network()
    before = wiring(model)

    def broken() -> None:
        raise RuntimeError("no kernels here")

    monkeypatch.setattr("frostline.running.train_only.lean_kernels", broken)
    with pytest.raises(RuntimeError, match="no kernels here"):
        fl.train_only(model, "8")
    assert wiring(model) == before
    monkeypatch.undo()
    fl.train_only(model, "8").close()  # and nobody holds the model


def test_close_works_without_a_with_block_and_twice():
    model = network()
    before = wiring(model)
    run = fl.train_only(model, "8")
    assert run.is_open
    assert [p.requires_grad for p in model.parameters()].count(True) == 2
    run.close()
    run.close()
    assert not run.is_open
    assert wiring(model) == before


def test_stale_gradients_of_frozen_parameters_are_set_aside_and_given_back():
    """FACTS 5: frozen in the middle of training, with momentum and zeroed gradients, the weight kept moving."""
    model = network().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    loss_of(model).backward()
    optimizer.step()
    stale = {name: p.grad for name, p in model.named_parameters()}
    before = state(model)
    with fl.train_only(model, "8.bias") as run:
        assert "set aside" in run.notes[0]
        for _ in range(2):
            optimizer.zero_grad(set_to_none=False)
            loss_of(model).backward()
            optimizer.step()
        assert [n for n, p in model.named_parameters() if p.grad is not None] == ["8.bias"]
    moved = [name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])]
    assert moved == ["8.bias"]
    assert all(p.grad is stale[name] for name, p in model.named_parameters())


def test_gradients_given_back_follow_a_model_that_was_cast_meanwhile():
    model = nn.Linear(3, 2)
    model(torch.randn(4, 3)).sum().backward()
    with fl.train_only(model, "bias"):
        model.double()
    assert model.weight.grad is not None
    assert model.weight.grad.dtype is torch.float64


# -- refused -----------------------------------------------------------------------------------------------------------


def test_entering_twice_is_refused():
    with fl.train_only(network(), "8") as run, pytest.raises(RunError, match="entered already"), run:
        pass


def test_a_closed_run_is_not_entered_and_not_audited():
    run = fl.train_only(network(), "8")
    run.close()
    with pytest.raises(RunError, match="closed"), run:
        pass
    with pytest.raises(RunError, match="closed"):
        run.audit(lambda: None)


def test_a_second_run_on_the_same_model_is_refused_and_named():
    model = network()
    with fl.train_only(model, "8") as run:
        before = wiring(model)
        with pytest.raises(RunError, match=r"'0.weight' is in a run already, that of '8' of Sequential"):
            fl.train_only(model, "@all")
        assert wiring(model) == before
        assert run.is_open
    fl.train_only(model, "@all").close()


def test_a_model_that_shares_a_parameter_with_one_in_a_run_is_refused():
    model = network()
    other = nn.Sequential(nn.Linear(4, 4), model[8])
    with fl.train_only(model, "0"), pytest.raises(RunError, match=r"'1.weight' is in a run already"):
        fl.train_only(other, "0")


def test_a_slice_is_refused_with_what_to_do():
    with pytest.raises(RunError, match=r"'8.weight\[:, :64\]' is a slice .* Train '8.weight' as a whole"):
        fl.train_only(network(), "8.weight[:, :64]")


def test_what_matches_nothing_is_the_resolvers_error():
    with pytest.raises(SubsetError):
        fl.train_only(network(), "classifier")


def test_a_run_may_be_closed_in_another_thread():
    model = network()
    before = wiring(model)
    run = fl.train_only(model, "8")
    thread = threading.Thread(target=run.close)
    thread.start()
    thread.join()
    assert not run.is_open
    assert wiring(model) == before
    assert not kernels_active()


# -- what may be passed, and what a run says ---------------------------------------------------------------------------


def test_train_takes_what_the_resolver_takes():
    model = network()
    wanted = ["8.weight", "8.bias"]
    for train in ("8", ["8.*"], model[8], list(model[8].parameters()), lambda n, p: n.startswith("8"), "@head"):
        with fl.train_only(model, train) as run:
            assert list(run.subset) == wanted
            assert [name for name, _ in run.named_parameters()] == wanted
            assert [id(p) for p in run.parameters()] == [id(p) for p in model[8].parameters()]
            subset = run.subset
    with fl.train_only(model, subset) as run:
        assert run.subset == subset
    for p in model[:8].parameters():
        p.requires_grad_(False)
    with fl.train_only(model) as run:
        assert list(run.subset) == wanted


def test_tied_parameters_train_under_any_of_their_names():
    model = nn.ModuleDict({"embed": nn.Embedding(10, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 10, bias=False)})
    model["head"].weight = model["embed"].weight
    with fl.train_only(model, "head") as run:
        assert [name for name, _ in run.named_parameters()] == ["embed.weight"]
        assert model["head"].weight.requires_grad
        assert not model["body"].weight.requires_grad


def test_a_run_prints_what_it_does():
    model = network()
    run = fl.train_only(model, "@head")
    assert repr(run) == "<train_only '@head' of Sequential: 2 of 8 parameters, open>"
    assert str(run) == (
        "train only '@head' of Sequential\n"
        "  trains   258 of 1,082 elements, in 2 of 8 tensors\n"
        "           @head matched 8.weight, 8.bias\n"
        "  buffers  of 2 frozen modules stay as they are: 1, 4"
    )
    run.close()
    assert repr(run).endswith("closed>")


def test_parameters_that_cannot_require_grad_stay_as_they_are():
    model = nn.Linear(3, 2)
    model.codes = nn.Parameter(torch.arange(3), requires_grad=False)
    with fl.train_only(model, "bias"):
        model(torch.randn(4, 3)).sum().backward()
    assert not model.codes.requires_grad


# -- other models and other threads ------------------------------------------------------------------------------------


def test_other_models_and_threads_train_as_ever():
    inside, outside, plain = network(), network(), network()
    entered, done = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def train_outside() -> None:
        try:
            entered.wait(30)
            for _ in range(5):
                loss_of(outside.eval()).backward()
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=train_outside)
    thread.start()
    with fl.train_only(inside, "8"):
        entered.set()
        while not done.is_set():
            loss_of(inside).backward()
        thread.join()
        neighbour = network()
        loss_of(neighbour).backward()
    assert not errors
    for _ in range(5):
        loss_of(plain.eval()).backward()
    for ours, theirs in zip(outside.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert all(p.grad is not None for p in neighbour.parameters())
    assert neighbour[1].num_batches_tracked == 1


# -- copies and compiled models ----------------------------------------------------------------------------------------


def test_a_copy_made_inside_is_free():
    model = network()
    with fl.train_only(model, "8"):
        clone = copy.deepcopy(model)
        saved = io.BytesIO()
        torch.save(model, saved)
    saved.seek(0)
    for free in (clone, torch.load(saved, weights_only=False)):
        free(batch()[0])
        assert free[1].num_batches_tracked == 1
        assert free[4].num_batches_tracked == 1


def test_a_compiled_model_gets_flags_and_buffers_and_says_so():
    for make in (lambda m: torch.compile(m, backend="aot_eager"), lambda m: m.compile(backend="aot_eager") or m):
        torch.compiler.reset()
        model = network()
        model[6].p = 0.0
        compiled = make(model)
        before = state(model)
        loss_of(compiled).backward()  # compiled before the run: it has to notice
        model.load_state_dict(before)
        model.zero_grad()
        with pytest.warns(FrostlineWarning, match="compiled"):
            run = fl.train_only(compiled, "8")
        with run:
            assert "compiled" in run.notes[0]
            optimizer = torch.optim.SGD(run.parameters(), lr=0.1)
            loss_of(compiled).backward()
            optimizer.step()
            assert [n for n, p in model.named_parameters() if p.grad is not None] == ["8.weight", "8.bias"]
        moved = [name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])]
        assert moved == ["8.weight", "8.bias"]
        loss_of(compiled).backward()
        assert model[1].num_batches_tracked == 1
    torch.compiler.reset()


def test_a_run_that_is_dropped_ends_and_says_so():
    model = network()
    before = wiring(model)
    with pytest.warns(ResourceWarning, match="'8' of Sequential.* was dropped, and so it ended: keep it"):
        fl.train_only(model, "8")
    assert wiring(model) == before
    assert not kernels_active()


def test_a_default_device_of_the_users_is_not_ours():
    model, image = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.MaxPool2d(2), nn.Dropout(0.2)),
        torch.randn(2, 3, 9, 9),
    )
    frozen = fl.trace(model, image, loss="sum").cost("0.bias", method="train-only")
    with torch.device("meta"):
        again = fl.trace(model, image, loss="sum").cost("0.bias", method="train-only")
        with fl.train_only(model, "0.bias") as run:
            audit = run.audit(lambda: model(image).sum().backward())
    assert again.saved_bytes == frozen.saved_bytes == audit.kept_bytes
    assert model[0].bias.grad.device.type == "cpu"


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
def test_copying_what_holds_a_run_neither_ends_it_nor_begins_another(how: Any):
    model = network()
    with fl.train_only(model, "0") as run:
        copied = how({"run": run})
        assert copied["run"] is run
        del copied
        gc.collect()
        assert run.is_open
        assert kernels_active()
        assert [name for name, p in model.named_parameters() if p.requires_grad] == ["0.weight", "0.bias"]
        with pytest.raises(RunError, match="Pickle its subset"):
            pickle.dumps(run)
    assert not kernels_active()


def test_parameters_that_took_anothers_place_are_put_back_and_trained():
    model = network()
    with fl.train_only(model, "8") as run:
        model.load_state_dict(network().state_dict(), assign=True)
        assert all(ours is theirs for ours, theirs in zip(run.parameters(), model[8].parameters(), strict=True))
    assert all(p.requires_grad for p in model.parameters())


def test_leaving_does_not_raise_whatever_became_of_a_frozen_parameter():
    with torch.inference_mode():
        made_there = nn.Linear(4, 4)
    model = nn.Sequential(nn.Embedding(10, 4), made_there, nn.Linear(4, 2))
    model[0].weight.grad = torch.ones(10, 4)
    with fl.train_only(model, "2"):
        model[0].weight.data = torch.randn(12, 4)  # plain PyTorch allows it
        assert not made_there.weight.requires_grad
    assert model[0].weight.grad is None  # it fits no more
    assert all(p.requires_grad for p in model.parameters())
