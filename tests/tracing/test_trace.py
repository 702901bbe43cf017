"""Tracing leaves no mark, whatever happens, and says what is wrong in one sentence."""

from __future__ import annotations

import random
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import frostline as fl


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(4 * 25, 2)
    )


def state_of(model: nn.Module) -> list[Any]:
    """Everything a trace might disturb: values bit for bit, flags, modes, hooks, attributes, random states."""
    tensors = [*model.parameters(), *model.buffers()]
    return [
        [t.detach().clone().numpy().tobytes() for t in tensors],
        [(id(t), t.requires_grad, t.grad is None, t._version) for t in tensors],
        [(m.training, sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        [{k: id(v) for k, v in m.__dict__.items()} for m in model.modules()],
        torch.random.get_rng_state().numpy().tobytes(),
        np.random.get_state()[1].tobytes(),  # type: ignore[index, union-attr]
        random.getstate(),
    ]


def test_a_trace_leaves_everything_as_it_was() -> None:
    model = cnn()
    model[0].weight.requires_grad_(False)  # type: ignore[union-attr, operator]
    model[1].register_forward_hook(lambda *_: None)
    x = torch.randn(2, 3, 5, 5)
    before, x_before = state_of(model), x.clone()
    trace = fl.trace(model, x, loss=lambda y: y.sum())
    trace.cost(train="5")
    trace.cost(method="optimizer-only")
    assert state_of(model) == before
    assert torch.equal(x, x_before)


class FailsHalfway(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.norm, self.linear, self.error = nn.BatchNorm1d(4), nn.Linear(4, 4), error
        self.cache: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.norm(x))
        self.cache.append(y)
        self.last = y
        torch.rand(1), random.random(), np.random.rand()
        raise self.error


@pytest.mark.parametrize("error", [ValueError("the user's own"), KeyboardInterrupt()])
def test_an_exception_leaves_everything_as_it_was(error: BaseException) -> None:
    model, x = FailsHalfway(error), torch.randn(3, 4)
    before = state_of(model)
    with pytest.raises(type(error)) as caught:
        fl.trace(model, x, loss=lambda y: y.sum())
    assert caught.value is error
    assert state_of(model) == before
    assert torch.autograd.Function.apply.__func__.__code__.co_filename.endswith("function.py")


def test_what_a_forward_leaves_on_its_modules_is_put_back() -> None:
    class Caches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.seen, self.table = nn.Linear(2, 2), [], {"calls": 0}

        def forward(self, x: Tensor) -> Tensor:
            self.seen.append(x)
            self.table["calls"] += 1
            self.cached = self.linear(x)
            return self.cached.sum()

    model = Caches()
    fl.trace(model, torch.randn(1, 2))
    assert model.seen == []
    assert model.table == {"calls": 0}
    assert not hasattr(model, "cached")


def test_a_training_step_after_a_trace_is_the_step_without_it() -> None:
    def losses(traced: bool) -> list[float]:
        model = cnn()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(1)
        found = []
        for _ in range(3):
            x = torch.randn(2, 3, 5, 5)
            if traced:
                fl.trace(model, x, loss=lambda y: y.sum()).cost()
            loss = functional.cross_entropy(model(x), torch.tensor([0, 1]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    assert losses(traced=True) == losses(traced=False)


def test_threads_that_do_not_trace_are_left_alone() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * 2

    stop, wrong = threading.Event(), []

    def other() -> None:
        while not stop.is_set():
            x = torch.ones(3, requires_grad=True)
            Double.apply(x).sum().backward()
            if x.grad is None or not torch.equal(x.grad, torch.full((3,), 2.0)):
                wrong.append(x.grad)

    thread = threading.Thread(target=other)
    thread.start()
    try:
        for _ in range(3):
            fl.trace(cnn(), torch.randn(2, 3, 5, 5), loss=lambda y: y.sum()).cost()
    finally:
        stop.set()
        thread.join()
    assert not wrong


def test_a_compiled_module_is_traced_eagerly() -> None:
    model = nn.Sequential(nn.Linear(4, 3), torch.compile(nn.Linear(3, 2), backend="eager"))
    cost = fl.trace(model, torch.randn(5, 4), loss=lambda y: y.sum()).cost("@all")
    assert cost.forward_flops == 2 * 5 * 4 * 3 + 2 * 5 * 3 * 2


# -- what bad input gets -----------------------------------------------------------------------------------------------


def test_no_scalar_loss_says_what_came_out_and_what_to_pass() -> None:
    with pytest.raises(fl.FrostlineError, match=r"shape \(8, 4\).*loss="):
        fl.trace(nn.Linear(16, 4), torch.randn(8, 16))


def test_a_loss_that_needs_no_gradient_is_refused() -> None:
    with pytest.raises(fl.FrostlineError, match="needs no gradient"):
        fl.trace(nn.Linear(16, 4), torch.randn(8, 16), loss=lambda y: y.detach().sum())


def test_a_loss_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(fl.FrostlineError, match="float"):
        fl.trace(nn.Linear(2, 2), torch.randn(1, 2), loss=lambda y: 1.0)  # type: ignore[arg-type, return-value]


def test_inputs_of_the_wrong_shape_raise_the_users_own_error_with_the_module() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(5, 2)))
    x = torch.randn(3, 4)
    with pytest.raises(RuntimeError) as own:
        model(x)
    with pytest.raises(RuntimeError) as traced:
        fl.trace(model, x, loss=lambda y: y.sum())
    assert str(traced.value) == str(own.value)
    assert "in module '1.1' (Linear)" in "".join(traced.value.__notes__)


def test_a_subset_the_loss_does_not_reach_is_named_with_where_the_path_ends() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.late = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.late(self.early(x).detach()).sum()

    trace = fl.trace(Cut(), torch.randn(2, 4))
    with pytest.raises(fl.FrostlineError, match=r"does not reach early\.weight.*module 'early'"):
        trace.cost(train="early")
    assert trace.cost(train="@all").unreached == ("early.weight", "early.bias")


def test_a_parameter_no_op_uses_is_named() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).sum()

    with pytest.raises(fl.FrostlineError, match=r"spare\.weight.*no op"):
        fl.trace(Unused(), torch.randn(2, 4)).cost(train="spare")


def test_a_model_on_meta_whose_values_decide_says_why_weights_are_needed() -> None:
    class Decides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            return (y if y.sum() > 0 else 2 * y).sum()

    with torch.device("meta"):
        model = Decides()
    with pytest.raises(fl.FrostlineError, match=r"values decide.*'linear\.weight' is on meta"):
        fl.trace(model, torch.randn(2, 4))


def test_an_unknown_optimizer_names_the_closest() -> None:
    trace = fl.trace(nn.Linear(2, 2), torch.randn(1, 2), loss=lambda y: y.sum())
    with pytest.raises(fl.FrostlineError, match="adamw"):
        trace.cost(optimizer="adamv")
    with pytest.raises(fl.FrostlineError, match="LBFGS"):
        trace.cost(optimizer=torch.optim.LBFGS)


def test_integer_parameters_cannot_train() -> None:
    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.codes = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return (self.linear(x) @ self.codes.to(x.dtype)).sum()

    trace = fl.trace(Quantised(), torch.randn(2, 4))
    with pytest.raises(fl.FrostlineError, match=r"codes.*int8"):
        trace.cost(train="codes")
    assert trace.cost(train="@all").gradient_bytes == (16 + 4) * 4


def test_a_device_that_is_not_there_lists_what_is() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(fl.FrostlineError, match=r"'cuda' is not here; there is: cpu"):
        fl.trace(nn.Linear(2, 2), torch.randn(1, 2), loss=lambda y: y.sum(), device="cuda")


def test_lazy_modules_and_models_without_parameters_are_refused() -> None:
    with pytest.raises(fl.FrostlineError, match="lazy"):
        fl.trace(nn.LazyLinear(3), torch.randn(1, 2))
    with pytest.raises(fl.FrostlineError, match="nothing to train"):
        fl.trace(nn.ReLU(), torch.randn(1, 2))


def test_sum_is_a_loss_and_makes_figures_assumed() -> None:
    cost = fl.trace(nn.Linear(2, 3), torch.randn(1, 2), loss="sum").cost("@all")
    assert cost.basis["saved_bytes"].startswith("assumed")


def test_a_fused_encoder_takes_its_fused_path_only_where_it_is_frozen() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(x)).sum()

    trace = fl.trace(Classifier().eval(), torch.randn(2, 5, 8))
    fused = "aten._transformer_encoder_layer_fwd.default"
    assert fused in {row.name for row in trace.cost(train="head").by_op()}
    assert fused not in {row.name for row in trace.cost(train="@all").by_op()}


class Clipped(nn.Module):
    """Writes to its weights, and then lets values decide: fake tensors cannot go all the way."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(9, 4, max_norm=0.5), nn.Linear(4, 2)

    def forward(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            self.out.weight.clamp_(-0.01, 0.01)
        hidden = self.out(self.table(ids))
        return hidden[hidden > 0].square().sum()


def test_a_real_forward_that_writes_to_weights_leaves_them_as_they_were() -> None:
    model, teacher = Clipped(), torch.ones(3)
    before = {name: (p.clone(), p._version) for name, p in model.named_parameters()}

    def step(lent: nn.Module) -> Tensor:
        loss = lent(torch.tensor([1, 2, 3]))
        teacher.mul_(0.5)  # not the model's, and written to all the same
        return loss

    trace = fl.trace(model, step=step)
    assert trace.forward == "real"
    trace.cost("out")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0]), name
        assert parameter._version == before[name][1], name
    assert torch.equal(teacher, torch.ones(3))


def test_a_step_that_fails_for_real_too_leaves_the_weights_as_they_were() -> None:
    model = nn.Linear(3, 2)
    before = model.weight.clone()

    def step(lent: nn.Module) -> Tensor:
        with torch.no_grad():
            lent.weight.mul_(0.5)
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fl.trace(model, step=step)
    assert torch.equal(model.weight, before)


def test_an_input_of_another_dtype_fails_as_it_would_without_us() -> None:
    with pytest.raises(RuntimeError, match="same dtype"):
        fl.trace(nn.Linear(3, 2), torch.randn(4, 3, dtype=torch.float64), loss=lambda out: out.sum())


def test_a_parameter_added_after_the_trace_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    trace = fl.trace(model, torch.randn(4, 3), loss=lambda out: out.sum())
    model.add_module("1", nn.Linear(2, 2))
    with pytest.raises(fl.FrostlineError, match=r"'1\.weight' was not in the model when it was traced"):
        trace.cost("1")


def test_a_step_that_writes_to_its_input_is_traced_on_fake_tensors_and_undone() -> None:
    model, x = nn.Linear(3, 2), torch.ones(4, 3)
    trace = fl.trace(model, x, loss=lambda out: out.sum() + x.mul_(2).sum())
    assert trace.forward == "fake"
    assert torch.equal(x, torch.ones(4, 3))


def test_costs_asked_for_inside_a_run_are_those_outside():
    """Another model's run is open in this thread: its kernels are not what freezing costs."""
    model, x = nn.Sequential(nn.Conv2d(3, 9, 3), nn.ReLU(), nn.Conv2d(9, 9, 3)), torch.randn(5, 3, 11, 11)
    with fl.train_only(nn.Linear(2, 2), "bias"):
        inside = fl.trace(model, x, loss="sum")
        assert inside.cost("0", method="freeze").saved_bytes == x.nbytes + 5 * 9 * 81 * 4
        figures = [
            inside.cost(subset, method).to_dict() for subset in ("0", "2") for method in ("freeze", "train-only")
        ]
    outside = fl.trace(model, x, loss="sum")
    assert figures == [outside.cost(s, method).to_dict() for s in ("0", "2") for method in ("freeze", "train-only")]
