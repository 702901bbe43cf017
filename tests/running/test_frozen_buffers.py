"""Buffers of wholly frozen modules stay to the bit, while outputs stay what train mode computes."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import frostline as fl
from frostline.running.buffers import wholly_frozen


class Codebook(nn.Module):
    """Quantises by a codebook that it moves by itself: in place, by assignment, and past autograd's eyes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(5, 4))
        self.register_buffer("counts", torch.zeros(5))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x, self.codes).argmin(dim=1)
        if self.training:
            self.steps += 1
            self.counts = self.counts * 0.9 + torch.bincount(nearest, minlength=5)
            self.codes.data.mul_(0.9)
            self.cache = self.cache + 1
        return x * self.codes[nearest] * self.steps


class Scaled(nn.Module):
    """Reads, in the same call, what it wrote: autograd saves the buffer as it was then."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.scale.mul_(2.0)
        return x * self.scale


class OwnForward(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked.add_(1)
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.5
        ).relu_()


class WritesAnyhow(nn.Module):
    """Reads a buffer first, and then writes to it by every door there is."""

    def __init__(self, write: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(4))
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        y = x * self.scale
        with torch.no_grad():
            self.write(self.scale)
        return y + self.scale


DOORS: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda t: t.add_(1),
    "data": lambda t: t.data.copy_(torch.ones(4)),
    "out": lambda t: torch.exp(t, out=t),
    "slice": lambda t: t[1:3].zero_(),
    "index": lambda t: t.index_put_((torch.tensor([0]),), torch.tensor([7.0])),
    "numpy": lambda t: t.numpy().fill(3),
    "set": lambda t: t.set_(torch.ones(4)),
    "storage": lambda t: t.untyped_storage().fill_(0),
    "memory": lambda t: ctypes.memset(t.data_ptr(), 0, 8),
    "foreach": lambda t: torch._foreach_mul_([t], 2.0),
}


SHAPES = {2: (6, 4), 3: (6, 4, 5), 4: (6, 4, 5, 5)}

MODULES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "batch norm 1d": (lambda: nn.BatchNorm1d(4), 2),
    "batch norm 1d, three dimensions": (lambda: nn.BatchNorm1d(4), 3),
    "batch norm 2d": (lambda: nn.BatchNorm2d(4), 4),
    "no affine": (lambda: nn.BatchNorm2d(4, affine=False), 4),
    "no affine 1d": (lambda: nn.BatchNorm1d(4, affine=False), 2),
    "cumulative average": (lambda: nn.BatchNorm2d(4, momentum=None), 4),
    "a forward of its own": (lambda: OwnForward(4), 4),
    "no statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), 4),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), 4),
    "instance norm, no affine": (lambda: nn.InstanceNorm2d(4, track_running_stats=True), 4),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(4, 4)), 2),
    "spectral norm, convolution": (lambda: parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)), 4),
    "spectral norm, old": (lambda: nn.utils.spectral_norm(nn.Linear(4, 4)), 2),
    "codebook": (Codebook, 2),
    "scaled": (Scaled, 2),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, dims = MODULES[name]
    x = torch.randn(SHAPES[dims])
    first = nn.Linear(x.shape[-1], x.shape[-1])
    return nn.ModuleDict({"first": first, "frozen": make(), "last": nn.LazyLinear(2)}), x


def run(model: nn.Module, x: Tensor) -> Tensor:
    return model["last"](model["frozen"](model["first"](x)).flatten(1))


def materialised(name: str) -> tuple[nn.Module, Tensor]:
    model, x = build(name)
    model.eval()
    run(model, x)
    return model.train(), x


WITH_THEIR_NEIGHBOUR = {"no affine", "no affine 1d", "instance norm, no affine", "codebook", "scaled"}


@pytest.mark.parametrize(
    ("name", "trained"),
    [(name, "last") for name in MODULES]
    + [(name, "first.bias") for name in MODULES if name not in WITH_THEIR_NEIGHBOUR],
)
def test_buffers_stay_and_outputs_and_gradients_are_those_of_train_mode(name: str, trained: str):
    model, x = materialised(name)
    plain, _ = materialised(name)
    plain.load_state_dict(model.state_dict())
    before = {n: b.clone() for n, b in model.named_buffers()}
    initial = {n: b.clone() for n, b in plain.state_dict().items()}
    for n, p in plain.named_parameters():
        p.requires_grad_(n.startswith(trained))
    with fl.train_only(model, trained):
        for _ in range(3):
            plain.load_state_dict(initial)  # plain PyTorch's own first step, each time
            plain["frozen"].cache = torch.zeros(1)
            expected, got = run(plain, x), run(model, x)
            assert torch.equal(got, expected)
            model.zero_grad()
            plain.zero_grad()
            got.square().sum().backward()
            expected.square().sum().backward()
            for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
                assert (ours.grad is None) == (theirs.grad is None)
                assert ours.grad is None or torch.equal(ours.grad, theirs.grad)
    for n, b in model.named_buffers():
        if "cache" not in n:
            assert torch.equal(b, before[n]), n


def before_a_frozen_layer(module: nn.Module) -> nn.Sequential:
    """One that trains, then a module that goes with what is frozen."""
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), module)).train()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("made", ["by torch", "by numpy", "in shared memory", "a view"])
def test_a_buffer_stays_however_it_is_written_to_and_wherever_it_lies(door: str, made: str):
    module = WritesAnyhow(DOORS[door])
    if made == "by numpy":
        module.scale = torch.from_numpy(module.scale.numpy().copy())
    elif made == "in shared memory":
        module.scale.share_memory_()
    elif made == "a view":
        module.scale = torch.cat([module.scale, module.scale])[4:]
    model = before_a_frozen_layer(module)
    lies, before, written = module.scale, module.scale.clone(), module.scale.clone()
    DOORS[door](written)
    expected = model[1][0](model[0](torch.ones(2, 4))) * before + written
    with fl.train_only(model, "0.weight"):
        for _ in range(2):
            assert torch.equal(model(torch.ones(2, 4)), expected)
            assert module.scale is lies
            assert torch.equal(lies, before)
    assert torch.equal(lies, before)


def test_a_buffer_that_is_only_read_is_not_copied():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.randn(4, 4))
            self.address = 0

        def forward(self, x: Tensor) -> Tensor:
            result = x @ self.table
            self.address = torch._C._data_address(self.table)
            return result

    model = before_a_frozen_layer(Reads())
    address = model[1][1].table.data_ptr()
    with fl.train_only(model, "0.weight") as made:
        audit = made.audit(lambda: model(torch.randn(2, 4)).sum().backward())
    assert model[1][1].address == address
    assert model[1][1].table.data_ptr() == address
    assert audit.kept_bytes == 2 * 4 * 4  # the input


def test_freeze_buffers_off_lets_them_move_as_in_plain_pytorch():
    model, x = materialised("batch norm 2d")
    with fl.train_only(model, "last", freeze_buffers=False) as made:
        run(model, x)
    assert made.frozen_modules == ()
    assert model["frozen"].num_batches_tracked == 1


def test_a_cache_that_state_dict_leaves_out_may_be_renewed():
    model, x = materialised("codebook")
    with fl.train_only(model, "last"):
        run(model, x)
        run(model, x)
    assert model["frozen"].cache == 2


def test_a_norm_whose_bias_trains_keeps_its_statistics_moving():
    model, x = materialised("batch norm 2d")
    with fl.train_only(model, "frozen.bias") as made:
        run(model, x)
    assert "frozen" not in made.frozen_modules
    assert model["frozen"].num_batches_tracked == 1


def test_eval_mode_reads_the_statistics():
    model, x = materialised("batch norm 2d")
    run(model, x)
    model.eval()
    expected = run(model, x)
    with fl.train_only(model, "last"):
        assert torch.equal(run(model, x), expected)
        model.train()
        assert not torch.equal(run(model, x), expected)
        model.eval()
        assert torch.equal(run(model, x), expected)


def test_a_wrong_number_of_channels_raises_as_in_plain_pytorch():
    for affine in (True, False):
        model = nn.Sequential(nn.BatchNorm2d(4, affine=affine), nn.Conv2d(5, 1, 1))
        with fl.train_only(model, "1"), pytest.raises(RuntimeError):
            model(torch.randn(2, 5, 3, 3))


# -- how modules are called --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["batch norm 2d", "spectral norm", "codebook"])
def test_checkpoints_run_it_again_in_backward(name: str, reentrant: bool):
    model, x = materialised(name)
    before = {n: b.clone() for n, b in model.named_buffers()}
    x.requires_grad_()
    with fl.train_only(model, "last"):
        middle = checkpoint(model["frozen"], x, use_reentrant=reentrant)
        model["last"](middle.flatten(1)).sum().backward()
    assert model["last"].weight.grad is not None
    assert x.grad is not None
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers() if "cache" not in n)


def test_a_module_called_several_times_a_step():
    for name in ("batch norm 2d", "spectral norm", "codebook"):
        model, x = materialised(name)
        before = {n: b.clone() for n, b in model.named_buffers()}
        with fl.train_only(model, "last"):
            middle = sum(model["frozen"](x * scale) for scale in (1.0, 2.0, 3.0))
            model["last"](middle.flatten(1)).sum().backward()
        assert all(torch.equal(b, before[n]) for n, b in model.named_buffers() if "cache" not in n)


class Recursive(nn.Module):
    """Calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Tensor, depth: int = 3) -> Tensor:
        self.calls += 1
        return self(x, depth - 1) if depth else x * self.calls


def test_a_module_that_calls_itself_sees_its_own_writes():
    model = nn.Sequential(nn.Linear(4, 4), Recursive(), nn.Linear(4, 1))
    with fl.train_only(model, "2"):
        x = torch.randn(2, 4)
        assert torch.equal(model[1](x), x * 4)
        assert torch.equal(model[1](x), x * 4)
    assert model[1].calls == 0


def test_threads_that_call_one_module_at_once():
    model, x = materialised("codebook")
    expected = model["frozen"](x)  # (plain: the first call)
    model, x = materialised("codebook")
    before = {n: b.clone() for n, b in model.named_buffers()}
    identities = [id(b) for n, b in model.named_buffers() if "cache" not in n]
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(200):
                model["frozen"](x)
        except BaseException as error:
            errors.append(error)

    with fl.train_only(model, "last"):
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.equal(model["frozen"](x), expected)
    assert not errors
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers() if "cache" not in n)
    assert [id(b) for n, b in model.named_buffers() if "cache" not in n] == identities


def test_replicas_that_share_buffers_do_not_write_them():
    """What ``nn.DataParallel`` makes for its first device."""
    model, x = materialised("codebook")
    with fl.train_only(model, "last"):
        replica = model["frozen"]._replicate_for_data_parallel()
        replica(x)
    assert model["frozen"].steps == 0
    assert torch.equal(model["frozen"].counts, torch.zeros(5))


def test_functional_call_with_buffers_of_the_users_own():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
    given = {n: t.clone() for n, t in model.state_dict().items()}
    with fl.train_only(model, "1"):
        torch.func.functional_call(model, given, (torch.randn(6, 4),))
        own = [id(b) for b in model.buffers()]
    assert given["0.num_batches_tracked"] == 0
    assert [id(b) for b in model.buffers()] == own


# -- which modules are wholly frozen -----------------------------------------------------------------------------------


def frozen(model: nn.Module, trained: str) -> list[str]:
    return list(wholly_frozen(model, {id(p) for n, p in model.named_parameters() if n.startswith(trained)}))


def plain_norm() -> nn.Module:
    return nn.BatchNorm2d(2, affine=False)


def test_a_module_goes_by_its_own_parameters():
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    assert frozen(model, "0") == ["1"]
    assert frozen(model, "1.bias") == []


def test_a_module_without_parameters_goes_with_the_last_before_it_or_the_first_after():
    conv = nn.Conv2d(2, 2, 1)
    model = nn.Sequential(plain_norm(), conv, plain_norm(), nn.Conv2d(2, 2, 1))
    assert frozen(model, "1") == []
    assert frozen(model, "3") == ["0", "2"]
    assert frozen(model, "no such") == ["0", "2"]


def test_the_neighbour_is_looked_for_in_the_smallest_module_around():
    block = nn.Sequential(plain_norm(), nn.Conv2d(2, 2, 1))
    model = nn.Sequential(nn.Conv2d(2, 2, 1), block, nn.Sequential(nn.Sequential(plain_norm())))
    assert frozen(model, "0") == ["1.0", "2.0.0"]
    assert frozen(model, "1") == []


def test_a_parametrization_goes_with_the_weight_that_it_changes():
    model = nn.Sequential(nn.Linear(2, 2), parametrizations.spectral_norm(nn.Linear(2, 2)), nn.Linear(2, 2))
    assert frozen(model, "0") == ["1.parametrizations.weight.0"]
    assert frozen(model, "2") == ["1.parametrizations.weight.0"]
    assert frozen(model, "1.bias") == ["1.parametrizations.weight.0"]
    assert frozen(model, "1.parametrizations") == []


def test_a_container_with_buffers_goes_by_what_is_inside():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    model[1].register_buffer("count", torch.tensor(0))
    model.register_buffer("mean", torch.zeros(2))
    assert frozen(model, "0") == ["1"]
    assert frozen(model, "1") == []


class Interrupted(nn.Module):
    """A batch norm whose caller is interrupted, once, when it has lent its statistics away."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.interrupts = True

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.first(x))


@pytest.mark.parametrize("then", ["saves", "evaluates", "trains"])
def test_an_interrupt_leaves_the_statistics_to_its_handler(then: str):
    model, x = Interrupted(), torch.randn(4, 3)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    model(x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model.eval()(x)
    model.train()
    with fl.train_only(model, "first"):
        hook = model.norm.register_forward_hook(interrupt, prepend=True)
        with pytest.raises(KeyboardInterrupt):
            model(x)
        hook.remove()
        if then == "evaluates":
            assert torch.equal(model.eval()(x), expected)
        if then == "trains":
            model(x).sum().backward()
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_hook_of_the_users_reads_the_statistics():
    model, x, seen = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), torch.randn(4, 3), []
    model[1].register_forward_pre_hook(lambda norm, _: seen.append(norm.running_mean.clone()))
    with fl.train_only(model, "0"):
        model(x)
        model(x)
    assert torch.equal(seen[0], torch.zeros(3))
    assert torch.equal(seen[1], torch.zeros(3))


@pytest.mark.parametrize("affine", [False, True])
def test_statistics_are_as_precise_as_without_a_run(affine: bool):
    """A half-precise input beside float32 statistics: torch's kernel goes by the buffers."""

    def outcome(run: bool) -> tuple[Tensor, Tensor | None]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=affine))
        model[1].requires_grad_(False)
        x = torch.randn(4, 3, 8, 8)
        with fl.train_only(model, "0") if run else nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16):
            result = model(x)
        result.float().square().sum().backward()
        return result.detach(), model[0].weight.grad

    for ours, eager in zip(outcome(True), outcome(False), strict=True):
        assert torch.equal(ours, eager)


def test_two_runs_whose_models_share_a_module_without_parameters():
    """An actor and a critic behind one normaliser: its buffer is the same tensor afterwards."""
    shared, x = Scaled(), torch.randn(3, 4)
    scale = shared.scale
    actor, critic = nn.Sequential(shared, nn.Linear(4, 2)), nn.Sequential(shared, nn.Linear(4, 1))
    for model in (actor, critic):
        model.append(nn.Linear(model[1].out_features, 1))
    with fl.train_only(actor, "2"), fl.train_only(critic, "2"):
        actor(x)
        critic(x)
    assert shared.scale is scale
    assert torch.equal(scale, torch.ones(4))
