"""Each rule finds its fault, names what it is about, and finds nothing once its fix is applied as printed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.watching.faults import FAULTS
from tests.watching.look_alikes import HEAD
from tests.watching.watching import found, mended, only, watched, write

import frostline as fl
from frostline.watching.finding import Level
from frostline.watching.rules import rules

DOCS = Path(__file__).parents[2] / "docs" / "watching"


@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_is_found_and_after_its_fix_it_is_gone(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    path = write(tmp_path, HEAD + fault.source)
    seen, ended = watched(path)
    assert (ended.code, seen.notes) == (0, [])
    assert sorted(found(seen)) == sorted([fault.rule, *fault.also])
    finding = only(seen, fault.rule)
    with_figures = [each.fixed for each in seen.findings if each.fixed is not None]
    if len(with_figures) == 1:
        assert seen.fixed == with_figures[0]
    assert finding.parameters == fault.parameters
    assert finding.place.startswith(str(path))
    assert finding.evidence
    again, ended = watched(mended(path, finding, fault.after))
    assert (ended.code, again.notes) == (0, [])
    assert fault.rule not in found(again)
    if finding.fixed is not None and fault.rule != "unneeded-saved-tensors":  # (its kernels are not in a plain trace)
        assert again.now is not None
        assert finding.now is not None
        assert again.now.step_flops == finding.fixed.step_flops < finding.now.step_flops
        assert again.now.saved_bytes == finding.fixed.saved_bytes


def test_what_train_only_would_keep_is_what_a_run_keeps(tmp_path: Path) -> None:
    """The predicted bytes against an audit of one real step inside of ``fl.train_only``."""
    fault = FAULTS["frozen convolutions behind a trained first one"]
    seen, _ = watched(write(tmp_path, HEAD + fault.source))
    finding = only(seen, fault.rule)
    assert finding.fixed is not None
    model = seen.record.models[0].module
    inputs, labels = torch.randn(8, 3, 32, 32), torch.randint(5, (8,))
    with fl.train_only(model) as run:
        audit = run.audit(lambda: F.cross_entropy(model(inputs), labels).backward())
    assert audit.kept_bytes == finding.fixed.saved_bytes
    assert audit.backward_flops == finding.fixed.backward_flops


def test_the_step_with_all_fixes_is_that_of_the_script_with_all_fixes(tmp_path: Path) -> None:
    """One that freezes, and one that is another trace, printed for the same line."""
    source = FAULTS["inputs made to require grad"].source
    source = source.replace("[p for p in model.parameters() if p.requires_grad]", "model.classifier.parameters()")
    path = write(tmp_path, HEAD + source)
    seen, _ = watched(path)
    rules = {"forced-input-grad", "unowned-grad"}
    assert rules <= set(found(seen))
    for rule in sorted(rules):
        again, _ = watched(path := mended(path, only(watched(path)[0], rule)))
    assert not rules & set(found(again))
    assert seen.fixed is not None
    assert again.now is not None
    now, fixed = again.now, seen.fixed
    assert (now.step_flops, now.saved_bytes) == (fixed.step_flops, fixed.saved_bytes)
    assert all(each.fixed.step_flops > fixed.step_flops for each in seen.findings if each.fixed is not None)


def test_the_step_with_all_fixes_is_a_run_of_train_only_where_one_of_them_is(tmp_path: Path) -> None:
    source = FAULTS["frozen convolutions behind a trained first one"].source
    source = source.replace(
        "model[0].requires_grad_(True)", "model[0].requires_grad_(True)\nmodel[8].requires_grad_(True)"
    )
    seen, _ = watched(write(tmp_path, HEAD + source))
    assert sorted(found(seen)) == ["unneeded-saved-tensors", "unowned-grad"]
    model = seen.record.models[0].module
    model[8].requires_grad_(False)
    inputs, labels = torch.randn(8, 3, 32, 32), torch.randint(5, (8,))
    with fl.train_only(model) as run:
        audit = run.audit(lambda: F.cross_entropy(model(inputs), labels).backward())
    assert seen.fixed is not None
    assert (audit.kept_bytes, audit.backward_flops) == (seen.fixed.saved_bytes, seen.fixed.backward_flops)


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault.rule != "stochastic-frozen"])
def test_ignored_it_is_not_found(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    seen, _ = watched(write(tmp_path, HEAD + fault.source), ignore=[fault.rule])
    assert found(seen) == list(fault.also)


def test_every_rule_has_a_fault_and_a_page() -> None:
    several = {"ranks-differ", "memory-given-back"}  # (of several processes, of the machine: in files of their own)
    assert {rule.id for rule in rules()} == {fault.rule for fault in FAULTS.values()} | several
    for rule in rules():
        assert (DOCS / f"{rule.id}.md").read_text().startswith(f"# {rule.id} ({rule.level})\n")


def test_findings_come_in_the_order_of_their_level(tmp_path: Path) -> None:
    seen, _ = watched(write(tmp_path, HEAD + FAULTS["clipping over all, the optimizer owns the head"].source))
    assert [finding.level for finding in seen.findings] == [Level.WRONG, Level.WASTE]


def test_clipping_is_told_in_the_factors_that_torch_applied(tmp_path: Path) -> None:
    """The norms again, by hand, in the script itself."""
    source = FAULTS["clipping over all, the optimizer owns the head"].source.replace(
        "    nn.utils", "    norms = [p.grad.norm().item() for p in model.parameters()]\n    print(norms)\n    nn.utils"
    )
    seen, _ = watched(write(tmp_path, HEAD + source))
    clip = seen.record.clips[0]
    assert clip.norm > clip.owned_norm > 0


def test_frozen_weights_that_moved_are_told_in_what_they_moved_by(tmp_path: Path) -> None:
    seen, _ = watched(write(tmp_path, HEAD + FAULTS["frozen in mid-training, gradients set to zero"].source))
    assert [move.step for move in seen.record.frozen_moves] == [4, 4, 5, 5]
    assert all(move.most > 0 for move in seen.record.frozen_moves)
