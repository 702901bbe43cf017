"""Every model of the zoo, a part of it trained: plain PyTorch's gradients, and an audit that agrees with the cost."""

from __future__ import annotations

import random
from contextlib import nullcontext, suppress

import pytest
import torch
from tests.cases import CASES, Case
from tests.truth.comparing import trace_case
from torch import Tensor

import frostline as fl
from frostline.running.audit import Audit

EXPECTED = {"not-reached", "forced-gradient", "discarded-gradient"}  # some models are about just that
SEVERAL_BACKWARDS = {"gradient_penalty"}  # the cost calls what runs before the loss returns forward
OTHERS_KEEP_TOO = {"forward_mode_inside"}  # torch holds the dual tensors
STATISTICS_LENT = {"norms_with_their_own_forward"}  # lean kernels leave them out, and here there are none


def chosen(case: Case) -> list[str]:
    names = [name for name, _ in case.model.named_parameters()]
    picked = random.Random(case.name).sample(names, max(1, len(names) // 3))
    return sorted(picked, key=names.index)


def dense(gradient: Tensor | None) -> Tensor | None:
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient


def audited(case: Case, names: list[str]) -> tuple[Audit, Tensor, tuple[str, ...]]:
    losses = []

    def step() -> None:
        loss = case.run()
        losses.append(loss.detach().clone())
        loss.backward()

    with fl.train_only(case.model, names) as run:
        return run.audit(step), losses[0], run.frozen_modules


@pytest.mark.parametrize("name", sorted(name for name, builder in CASES.items() if not builder.missing))
def test_a_step_of_a_run_is_plain_pytorchs_and_its_audit_agrees_with_the_cost(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    case, plain = CASES[name](), CASES[name]()
    names = chosen(case)
    cost = None
    with suppress(fl.FrostlineError):  # the loss does not reach them
        cost = trace_case(CASES[name]()).cost(names)
    for parameter_name, parameter in plain.model.named_parameters():
        parameter.requires_grad_(parameter_name in names)
    try:
        expected = plain.run()
        expected.backward()
    except RuntimeError:
        pytest.skip("plain PyTorch refuses this subset")
    before = {n: b.clone() for n, b in case.model.named_buffers()}
    monkeypatch.setattr("frostline.running.train_only.lean_kernels", nullcontext)
    audit, loss, frozen = audited(case, names)
    assert torch.equal(loss, expected.detach())
    for (n, ours), theirs in zip(case.model.named_parameters(), plain.model.parameters(), strict=True):
        got, wanted = dense(ours.grad), dense(theirs.grad)
        assert (got is None) == (wanted is None), n
        assert got is None or torch.equal(got, wanted), n
    for n, buffer in case.model.named_buffers():
        assert n.rpartition(".")[0] not in frozen or torch.equal(buffer, before[n]), n
    assert {finding.kind for finding in audit.beyond} <= EXPECTED
    if cost is not None and name not in SEVERAL_BACKWARDS:
        assert audit.backward_flops == cost.backward_flops
        if (
            name not in OTHERS_KEEP_TOO | STATISTICS_LENT
        ):  # what only a checkpoint keeps of the step's inputs is not in the audit
            assert audit.kept_bytes == cost.saved_bytes or (
                "checkpoint" in name and audit.kept_bytes < cost.saved_bytes
            )
