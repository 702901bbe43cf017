"""run.audit: each thing that goes beyond the plan is named, and a clean step is clean."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.running.small import batch, loss_of, network, wiring
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import frostline as fl
from frostline.errors import AuditError
from frostline.running.audit import Audit
from frostline.running.recorder import StepRecorder


def step_of(model: nn.Module, run: Any = None) -> Callable[[], None]:
    optimizer = None if run is None else torch.optim.AdamW(run.parameters())

    def step() -> None:
        model.zero_grad()
        loss_of(model).backward()
        if optimizer is not None:
            optimizer.step()

    return step


def kinds(audit: Audit) -> list[str]:
    return [finding.kind for finding in audit.findings]


def only(audit: Audit, kind: str) -> Any:
    (finding,) = [finding for finding in audit.findings if finding.kind == kind]
    return finding


class Wasteful(torch.autograd.Function):
    """A matrix product that ignores ``needs_input_grad``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        return gradient @ weight.t(), x.t() @ gradient


class Product(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, size))

    def forward(self, x: Tensor) -> Tensor:
        return Wasteful.apply(x, self.weight)


# -- a clean step ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("subset", ["8", "3", "1", "0.weight", "*.bias", "@all"])
def test_a_clean_step_is_clean_and_keeps_and_runs_what_its_cost_says(subset: str):
    model = network()
    cost = fl.trace(model, batch()[0], loss=lambda out: F.cross_entropy(out, batch()[1])).cost(subset)
    with fl.train_only(model, subset) as run:
        audit = run.audit(step_of(model, run), strict=True)
    assert audit.beyond == ()
    assert audit.backward_flops == cost.backward_flops
    assert audit.kept_bytes <= cost.saved_bytes
    assert {op.use for op in audit.ops} <= {"asked", "nothing", "other"}
    assert all(op.flops == 0 for op in audit.ops if op.use != "asked")


def test_without_lean_kernels_the_kept_bytes_are_those_of_freeze(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("frostline.running.train_only.lean_kernels", nullcontext)
    for subset in ("8", "3", "1", "0.weight", "*.bias", "@all"):
        model = network()
        cost = fl.trace(model, batch()[0], loss=lambda out: F.cross_entropy(out, batch()[1])).cost(subset)
        with fl.train_only(model, subset) as run:

            def step() -> None:
                inputs, labels = batch()
                outputs = run.model(inputs)
                hidden = outputs * 2  # held by this function, and by nothing else
                F.cross_entropy(outputs, labels).backward()
                assert hidden.shape == outputs.shape

            assert run.audit(step).kept_bytes == cost.saved_bytes


def test_the_step_is_a_real_one_and_the_recorder_leaves_nothing_behind():
    model, plain = network(), network()
    with fl.train_only(model, "8") as run, fl.train_only(plain, "8") as unwatched:
        step, unwatched_step = step_of(model, run), step_of(plain, unwatched)
        before = wiring(model)["hooks"], wiring(model)["tensor hooks"]
        torch.manual_seed(5)
        run.audit(step)
        run.audit(step)
        assert [not hooks for hooks in wiring(model)["tensor hooks"]] == [not hooks for hooks in before[1]]
        assert wiring(model)["hooks"] == before[0]
        torch.manual_seed(5)
        unwatched_step()
        unwatched_step()
        for ours, theirs in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs)
    assert "_engine_run_backward" in vars(torch.autograd)


def test_an_audit_is_data_and_text():
    model = network()
    with fl.train_only(model, "8") as run:
        audit = run.audit(step_of(model, run))
    data = json.loads(json.dumps(audit.to_dict()))
    assert data["kept_bytes"] == audit.kept_bytes
    product = next(op for op in data["ops"] if op["flops"])
    assert (product["op"], product["node"], product["module"], product["mask"], product["use"]) == (
        "mm", "AddmmBackward0", "8", [True], "asked",
    )  # fmt: skip
    assert str(audit).startswith("audit of a step that trains 8: nothing beyond the plan\nbackward 2.05 kFLOP")


def test_masks_tell_which_gradients_a_kernel_computed():
    model = network()
    with fl.train_only(model, "3.weight") as run:
        audit = run.audit(step_of(model))
    masks = {op.module: op.mask for op in audit.ops if op.op == "convolution_backward"}
    assert masks == {"3": (False, True, False)}


def test_an_exception_in_the_step_passes_and_the_run_goes_on():
    model = network()
    with fl.train_only(model, "8") as run:
        before = wiring(model)["hooks"]

        def step() -> None:
            loss_of(model).backward()
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            run.audit(step)
        assert wiring(model)["hooks"] == before
        assert run.audit(step_of(model, run)).beyond == ()


def test_backward_runs_of_other_threads_are_not_seen():
    model, other = network(), network()
    with fl.train_only(model, "8") as run:

        def step() -> None:
            thread = threading.Thread(target=lambda: loss_of(other).backward())
            thread.start()
            thread.join()
            step_of(model)()

        audit = run.audit(step)
    assert audit.beyond == ()
    assert {op.module for op in audit.ops} == {"", "8"}


# -- reach -------------------------------------------------------------------------------------------------------------


def test_a_subset_that_the_loss_does_not_reach_is_named():
    model = nn.ModuleDict({"body": nn.Linear(4, 2), "aside": nn.Linear(4, 2)})
    with fl.train_only(model, ["body", "aside"]) as run:
        audit = run.audit(lambda: model["body"](torch.randn(3, 4)).sum().backward())
    assert only(audit, "not-reached").names == ("aside.weight", "aside.bias")
    assert audit.beyond == (only(audit, "not-reached"),)


def test_a_subset_that_is_not_reached_at_all_and_a_step_without_backward():
    model = nn.ModuleDict({"body": nn.Linear(4, 2), "aside": nn.Linear(4, 2)})
    with fl.train_only(model, "aside") as run:
        x = torch.randn(3, 4, requires_grad=True)
        audit = run.audit(lambda: model["body"](x).sum().backward())
        assert "none of the subset" in only(audit, "not-reached").text
        assert kinds(run.audit(lambda: model["body"](x))) == ["no-backward"]


def test_gradients_by_autograd_grad_count_as_reached():
    model = nn.Linear(4, 2)
    with fl.train_only(model, "weight") as run:
        audit = run.audit(lambda: torch.autograd.grad(model(torch.randn(3, 4)).sum(), list(run.parameters())))
    assert audit.beyond == ()


def test_gradients_that_the_step_clears_count_as_reached():
    model = nn.Linear(4, 2)

    def step() -> None:
        model(torch.randn(3, 4)).sum().backward()
        model.zero_grad()

    with fl.train_only(model, "weight") as run:
        assert run.audit(step).beyond == ()


# -- gradients nobody asked for ----------------------------------------------------------------------------------------


def test_a_function_that_ignores_needs_input_grad_is_named_with_its_price():
    model = nn.Sequential(nn.Linear(8, 8), Product(8), nn.Linear(8, 2))
    with fl.train_only(model, "0") as run:
        audit = run.audit(lambda: model(torch.randn(16, 8)).sum().backward())
    finding = only(audit, "discarded-gradient")
    assert finding.flops == 2 * 16 * 8 * 8
    assert finding.names == ("1",)
    assert "WastefulBackward in 1" in finding.text
    assert "needs_input_grad" in finding.text
    discarded = [op for op in audit.ops if op.use == "discarded" and op.flops]
    assert [(op.op, op.module, op.flops) for op in discarded] == [("mm", "1", 2 * 16 * 8 * 8)]


def test_strict_raises_with_the_audit_after_the_step_has_run():
    model = nn.Sequential(nn.Linear(8, 8), Product(8), nn.Linear(8, 2))
    with fl.train_only(model, "0") as run:
        with pytest.raises(AuditError, match="needs_input_grad") as raised:
            run.audit(lambda: model(torch.randn(16, 8)).sum().backward(), strict=True)
        assert raised.value.audit.beyond
        assert model[0].weight.grad is not None


@pytest.mark.parametrize("kind", ["none", "non-reentrant", "reentrant"])
def test_forced_input_gradients_are_named_with_what_ran_only_for_them(kind: str):
    """What peft does for gradient checkpointing: the embedding's output is made to require grad."""
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(10, 8),
            "early": nn.Linear(8, 8),
            "late": nn.Linear(8, 8),
        }
    )
    model["embed"].register_forward_hook(lambda module, args, output: output.requires_grad_())

    def call(module: nn.Module, x: Tensor) -> Tensor:
        return module(x) if kind == "none" else checkpoint(module, x, use_reentrant=kind == "reentrant")

    tokens = torch.randint(10, (4, 5))
    with fl.train_only(model, "late") as run:
        audit = run.audit(lambda: call(model["late"], call(model["early"], model["embed"](tokens))).sum().backward())
    finding = only(audit, "forced-gradient")
    assert finding.names == ("embed",)
    assert "the output of embed, [4, 5, 8]" in finding.text
    product = 2 * 4 * 5 * 8 * 8
    recomputed = sum(op.flops for op in audit.ops if op.use == "recompute")
    assert recomputed == (2 * product if kind == "reentrant" else 0)  # the other kind stops early: nothing to do again
    assert finding.flops == 2 * product + recomputed // 2  # towards late's and early's inputs, and early done again
    assert audit.backward_flops == 3 * product + recomputed
    assert [finding.kind for finding in audit.beyond] == ["forced-gradient"]


def test_a_reentrant_checkpoint_over_what_trains_is_no_finding():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))

    def step() -> None:
        hidden = model[0](torch.randn(4, 8))
        model[2](checkpoint(model[1], hidden, use_reentrant=True)).sum().backward()

    with fl.train_only(model, "0,1") as run:
        assert run.audit(step).beyond == ()


def test_an_input_that_requires_grad_is_named():
    model = nn.Linear(4, 2)
    with fl.train_only(model, "bias") as run:
        audit = run.audit(lambda: model(torch.randn(3, 4, requires_grad=True)).sum().backward())
    assert "a tensor [3, 4] that the step was given" in only(audit, "forced-gradient").text
    assert only(audit, "forced-gradient").flops == 2 * 3 * 4 * 2


def test_a_parameter_that_something_unfroze_is_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with fl.train_only(model, "1") as run:

        def step() -> None:
            model[0].weight.requires_grad_(True)
            model(torch.randn(3, 4)).sum().backward()

        audit = run.audit(step)
    finding = only(audit, "foreign-gradient")
    assert finding.names == ("0.weight",)
    assert finding.flops == 2 * (2 * 3 * 4 * 2) // 2 + 2 * 3 * 4 * 4  # towards 1's input, and 0's weight
    assert not model[0].weight.grad


def test_a_gradient_written_by_hand_is_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))

    def step() -> None:
        model(torch.randn(3, 4)).sum().backward()
        model[0].bias.grad = torch.zeros(4)

    with fl.train_only(model, "1") as run:
        assert only(run.audit(step), "foreign-gradient").names == ("0.bias",)


# -- values that changed -----------------------------------------------------------------------------------------------


def test_a_frozen_parameter_that_an_optimizer_decays_is_named():
    """Fused AdamW and ``.data`` do not show in a tensor's version."""
    model = network()
    with fl.train_only(model, "8") as run:
        for change in (lambda p: p.data.mul_(0.9), lambda p: p.detach().numpy().__imul__(0.9)):

            def step(change: Callable[[Tensor], Any] = change) -> None:
                step_of(model)()
                change(model[0].weight)

            assert only(run.audit(step), "frozen-moved").names == ("0.weight",)


def test_nan_that_stays_nan_has_not_changed():
    model = network()
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    with fl.train_only(model, "8") as run:
        assert run.audit(step_of(model)).beyond == ()


def test_a_frozen_buffer_that_another_module_writes_is_named():
    model = network()

    def step() -> None:
        step_of(model)()
        model[1].running_mean.add_(1)

    with fl.train_only(model, "8") as run:
        assert only(run.audit(step), "buffer-moved").names == ("1.running_mean",)


def test_a_batch_norm_left_trainable_drifts_which_is_a_note():
    model = network()
    with fl.train_only(model, "1") as run:
        audit = run.audit(step_of(model, run), strict=True)
    assert only(audit, "buffer-drift").names == ("1.running_mean", "1.running_var", "1.num_batches_tracked")
    assert not only(audit, "buffer-drift").beyond


# -- kept bytes --------------------------------------------------------------------------------------------------------


def kept(model: nn.Module, step: Callable[[], Any]) -> int:
    recorder = StepRecorder(model, dict(model.named_parameters()))
    with recorder.watching():
        step()
    return sum(recorder.kept.values())


def test_kept_bytes_of_a_linear_can_be_checked_on_paper():
    model = nn.Linear(16, 4)
    x = torch.randn(8, 16)
    assert kept(model, lambda: model(x).sum().backward()) == 8 * 16 * 4
    model.weight.requires_grad_(False)
    assert kept(model, lambda: model(x).sum().backward()) == 0


def test_what_a_checkpoint_keeps_is_its_input_and_looking_recomputes_nothing():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    first = nn.Linear(16, 16)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(8, 16, requires_grad=True)
    step = lambda: checkpoint(model, first(x), use_reentrant=False).sum().backward()  # noqa: E731
    assert kept(nn.Sequential(first, model), step) == 2 * 8 * 16 * 4  # first's input, and the checkpoint's
    assert len(calls) <= 2


def test_what_a_function_keeps_past_torchs_own_list_counts():
    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.doubled = x * 2
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * ctx.doubled

    x = torch.randn(5, requires_grad=True)
    assert kept(nn.Linear(1, 1), lambda: Keeps.apply(x).sum().backward()) == 5 * 4 + 5 * 4  # and x, for its gradient


def test_several_backward_runs_show_the_largest():
    model = nn.Linear(16, 4)

    def step() -> None:
        for rows in (2, 8, 4):
            model(torch.randn(rows, 16)).sum().backward()

    assert kept(model, step) == 8 * 16 * 4


@pytest.mark.parametrize("view", [lambda y: y.view(-1), lambda y: y[1:], lambda y: y.t()])
def test_an_activation_written_to_a_view_keeps_what_its_cost_says(view: Any) -> None:
    """There torch's own kernel runs, and keeps the whole result."""

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            return view(x + self.shift).relu_().sum()

    model, x = Writes(), torch.randn(4, 4)
    cost = fl.trace(model, x, loss=lambda y: y).cost("@all", method="train-only")
    with fl.train_only(model, "@all") as run:
        assert run.audit(lambda: model(x).backward()).kept_bytes == cost.saved_bytes


def test_what_hooks_of_the_users_make_of_saved_tensors_is_counted():
    """Torch's own ``save_on_cpu`` keeps a tuple."""
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(3, 4)

    def step() -> None:
        with torch.autograd.graph.save_on_cpu():
            loss = model(x).sum()
        loss.backward()

    with fl.train_only(model, "0") as run:
        kept = run.audit(step).kept_bytes
    assert kept == 4 * (3 * 4 + 3 * 8)  # the input, and the result of tanh
