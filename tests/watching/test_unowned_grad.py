"""``unowned-grad``: the founding mistake is found, costed and mended."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.cases import Case, build, trainable_names
from tests.truth.reference import measure
from tests.watching.watching import found, mended, only, watched, write

from examples.small import DigitsCNN

SCRIPTS = Path(__file__).parents[2] / "examples" / "scripts"


def test_the_founding_script_has_one_finding(capsys: pytest.CaptureFixture[str]) -> None:
    seen, ended = watched(SCRIPTS / "middle_layer.py")
    assert ended.code == 0
    assert capsys.readouterr().out == "loss 1.3442\n"
    assert found(seen) == ["unowned-grad"]
    finding = only(seen, "unowned-grad")
    assert finding.modules == ("0", "4")
    assert finding.parameters == ("0.weight", "0.bias", "4.weight", "4.bias")
    assert finding.place.endswith("middle_layer.py:12")
    assert finding.fix.code == "for part in (model[0], model[4]):\n    part.requires_grad_(False)"
    # On paper: grad_weight of 10 x 20, 20 x 10 and 10 x 5, grad_input of the last two; needed: 20 x 10, through 10 x 5.
    assert finding.now is not None
    assert finding.fixed is not None
    assert finding.now.backward_flops == 2 * (200 + 200 + 50 + 200 + 50)
    assert finding.fixed.backward_flops == 2 * (200 + 50)
    assert finding.text.startswith("64 % of the backward")
    assert finding.basis == "exact"


def test_after_the_fix_as_printed_nothing_is_found_and_the_step_is_what_was_said(tmp_path: Path) -> None:
    path = write(tmp_path, (SCRIPTS / "middle_layer.py").read_text())
    seen, _ = watched(path)
    finding = only(seen, "unowned-grad")
    again, _ = watched(mended(path, finding))
    assert found(again) == []
    assert again.now is not None
    assert finding.fixed is not None
    assert again.now.step_flops == finding.fixed.step_flops
    assert again.now.saved_bytes == finding.fixed.saved_bytes


def test_the_figures_are_those_of_a_real_step() -> None:
    seen, _ = watched(SCRIPTS / "digits_cnn.py")
    assert found(seen) == ["unowned-grad"]
    finding = only(seen, "unowned-grad")
    assert finding.modules == ("conv1", "conv2")

    def digits() -> Case:
        labels_B = torch.randint(10, (8,))
        return Case(DigitsCNN(), torch.rand(8, 3, 28, 28), lambda logits_BC: F.cross_entropy(logits_BC, labels_B))

    case = build(digits)
    names = trainable_names(case.model)
    for figures, train in ((finding.now, names), (finding.fixed, [n for n in names if n.startswith("fc")])):
        truth = measure(case, train)
        assert figures is not None
        assert figures.forward_flops == truth.forward_flops
        assert figures.backward_flops == truth.grad_input_flops + truth.grad_weight_flops
        assert figures.saved_bytes == truth.saved_bytes
        assert figures.gradient_bytes == truth.gradient_bytes


def test_with_adam_over_everything_nothing_is_found() -> None:
    seen, _ = watched(SCRIPTS / "everything.py")
    assert found(seen) == []
    assert [row["moved"] for row in seen.who_trains()] == [6, 0, 0]


def test_a_replaced_head_is_named_with_its_model(tmp_path: Path) -> None:
    source = """
    import torch
    from torch import nn

    def main():
        encoder = nn.Linear(6, 8)
        head = nn.Linear(8, 2)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            head(encoder(torch.randn(4, 6))).sum().backward()
            optimizer.step()

    main()
    """
    path = write(tmp_path, source)
    seen, _ = watched(path)
    finding = only(seen, "unowned-grad")
    assert finding.parameters == ("encoder.weight", "encoder.bias")
    assert finding.fix.code == "encoder.requires_grad_(False)"
    assert finding.evidence[-1].startswith("weight.grad was never cleared")
    assert found(watched(mended(path, finding))[0]) == []


def test_the_readme_shows_what_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SCRIPTS.parents[1])
    seen, _ = watched(Path("examples/scripts/middle_layer.py"))
    assert f"loss 1.3442\n{seen}\n```" in Path("README.md").read_text()
