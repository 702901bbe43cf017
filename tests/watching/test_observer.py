"""What changes after the first steps is seen too: parameters that are replaced, thawed, or in no model."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.watching.look_alikes import HEAD
from tests.watching.watching import found, only, watched, write

STEPS = """
for step in range(8):
    thaw(step)
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(4, 10)), torch.randint(5, (4,))).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
"""
NEW_HEAD = """
def thaw(step):
    pass

model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 100))
with torch.no_grad():
    model(torch.randn(4, 10))
model[2] = nn.Linear(20, 5)
"""
THAWED = """
def thaw(step):
    model[0].requires_grad_(step >= 4)

model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
optimizer = torch.optim.AdamW(model[2].parameters())
"""


@pytest.mark.parametrize(
    "source", [NEW_HEAD + "optimizer = torch.optim.Adam(model[2].parameters())", THAWED], ids=["new head", "thawed"]
)
def test_a_body_that_no_optimizer_holds_is_found(source: str, tmp_path: Path) -> None:
    seen, ended = watched(write(tmp_path, HEAD + source + STEPS))
    assert (ended.code, seen.notes) == (0, [])
    assert found(seen) == ["clip-covers-unowned", "unowned-grad"]
    assert only(seen, "unowned-grad").parameters == ("0.weight", "0.bias")


def test_what_is_thawed_is_to_be_given_to_the_optimizer(tmp_path: Path) -> None:
    path = write(tmp_path, HEAD + THAWED + STEPS)
    fix = only(watched(path)[0], "unowned-grad").fix
    assert fix.where == "once, where they are unfrozen"
    step = "thaw(step)\n    optimizer"
    assert step in path.read_text()
    thawed = path.read_text().replace(step, f"thaw(step)\n    if step == 4:\n        {fix.code}\n    optimizer")
    again, ended = watched(write(tmp_path, thawed))
    assert (ended.code, found(again)) == (0, [])


def test_a_new_head_is_one_of_the_models_parameters_and_the_old_one_is_not(tmp_path: Path) -> None:
    seen, _ = watched(write(tmp_path, HEAD + NEW_HEAD + "optimizer = torch.optim.Adam(model.parameters())" + STEPS))
    assert found(seen) == []
    (model,) = seen.record.models
    assert [fact.parameter for fact in model.parameters.values()] == list(model.module.parameters())
    assert [fact.moved for fact in model.parameters.values()] == [True] * 4


def test_a_head_that_is_given_to_the_optimizer_later_is_seen(tmp_path: Path) -> None:
    source = """
model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
optimizer = torch.optim.Adam(model.parameters())
def thaw(step):
    if step == 5:
        model.append(nn.Linear(5, 5))
        optimizer.add_param_group({"params": model[3].parameters()})
"""
    seen, _ = watched(write(tmp_path, HEAD + source + STEPS))
    assert found(seen) == []
    assert [fact.name for _, fact in seen.record.facts()][-2:] == ["3.weight", "3.bias"]


def test_a_gradient_that_takes_no_flops_has_no_share_of_the_backward(tmp_path: Path) -> None:
    source = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift, self.other = nn.Parameter(torch.zeros(10)), nn.Parameter(torch.zeros(10))
        self.head = nn.Linear(10, 5)

    def forward(self, x):
        return self.head(x + self.shift + self.other)

model = Net()
optimizer = torch.optim.Adam([model.other, *model.head.parameters()])
for _ in range(2):
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(4, 10)), torch.randint(5, (4,))).backward()
    optimizer.step()
"""
    seen, _ = watched(write(tmp_path, HEAD + source))
    text = only(seen, "unowned-grad").text
    assert text == "the backward computes gradients for shift, and no optimizer uses them."


def test_gradients_of_a_network_while_an_image_is_trained_are_found(tmp_path: Path) -> None:
    source = """
net = nn.Conv2d(3, 4, 3).eval()
image = torch.rand(1, 3, 8, 8, requires_grad=True)
optimizer = torch.optim.Adam([image])
for _ in range(3):
    optimizer.zero_grad()
    net(image).square().sum().backward()
    optimizer.step()
"""
    seen, _ = watched(write(tmp_path, HEAD + source))
    assert found(seen) == ["unowned-grad"]
    assert only(seen, "unowned-grad").parameters == ("weight", "bias")
