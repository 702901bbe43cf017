"""A fix is code that runs where the report puts it: it calls things what the code there calls them."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from tests.watching.look_alikes import HEAD
from tests.watching.watching import found, mended, only, watched, write

STEP = """
optimizer.zero_grad()
F.cross_entropy(model(torch.randn(4, 10)), torch.randint(5, (4,))).backward()
optimizer.step()
"""
LOOP = "for _ in range(3):" + textwrap.indent(STEP, "    ")
NET = "nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 5))"

SCRIPTS = {
    "an attribute of self": (
        "unowned-grad",
        "self.model[0]",
        f"""
class Trainer:
    def __init__(self):
        self.model = {NET}
        self.optimizer = torch.optim.Adam(self.model[3].parameters())

    def train(self):
        for _ in range(3):
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(torch.randn(4, 10)), torch.randint(5, (4,))).backward()
            self.optimizer.step()

Trainer().train()
""",
    ),
    "items of a dict": (
        "unowned-grad",
        'nets["body"].requires_grad_(False)',
        """
nets = {"body": nn.Linear(10, 10), "head": nn.Linear(10, 5)}
optimizer = torch.optim.Adam(nets["head"].parameters())
for _ in range(3):
    optimizer.zero_grad()
    F.cross_entropy(nets["head"](nets["body"](torch.randn(4, 10))), torch.randint(5, (4,))).backward()
    optimizer.step()
""",
    ),
    "another name where it is trained": (
        "unowned-grad",
        "net[0]",
        f"""
def train(model, optimizer):
{textwrap.indent(LOOP, "    ")}
def main():
    net = {NET}
    adam = torch.optim.Adam(net[3].parameters())
    train(net, adam)

main()
""",
    ),
    "another name where it was called first": (
        "frozen-norm-drift",
        "model[1].eval()",
        f"""
def evaluate(m):
    m.eval()
    return m(torch.randn(4, 10))

def main():
    model = {NET}
    model[:2].requires_grad_(False)
    optimizer = torch.optim.Adam(model[3].parameters())
    evaluate(model)
    model.train()
{textwrap.indent(LOOP, "    ")}
main()
""",
    ),
    "names that are keywords, and a list of parameters": (
        "unowned-grad",
        'model.prompts[0], model.heads["in"], getattr(model, "class")',
        f"""
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.prompts = nn.ParameterList([nn.Parameter(torch.randn(10)) for _ in range(2)])
        self.heads = nn.ModuleDict({{"in": nn.Linear(10, 10), "out": nn.Linear(10, 10)}})
        self.add_module("class", nn.Linear(10, 5))

    def forward(self, x):
        for each in (*self.prompts,):
            x = x + each
        return getattr(self, "class")(self.heads["out"](self.heads["in"](x).relu()))

model = Net()
optimizer = torch.optim.Adam([model.prompts[1], *model.heads["out"].parameters()])
{LOOP}
""",
    ),
    "a frozen body in bfloat16 over the same samples": (
        "cacheable-prefix",
        "model[:4]",
        """
model = nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 5)).bfloat16()
model[:3].requires_grad_(False)
inputs, labels = torch.randn(12, 8).bfloat16(), torch.randint(5, (12,))
optimizer = torch.optim.Adam(model[4].parameters())
for _ in range(4):
    optimizer.zero_grad()
    F.cross_entropy(model(inputs).float(), labels).backward()
    optimizer.step()
""",
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_fix_runs_where_it_is_put_and_mends(name: str, tmp_path: Path) -> None:
    rule, says, source = SCRIPTS[name]
    path = write(tmp_path, HEAD + source)
    seen, ended = watched(path)
    assert (ended.code, seen.notes) == (0, [])
    finding = only(seen, rule)
    assert says in finding.fix.code
    again, ended = watched(mended(path, finding))
    assert (ended.code, again.notes) == (0, [])
    assert rule not in found(again)


def test_where_nothing_names_the_model_the_fix_says_so(tmp_path: Path) -> None:
    source = f"""
def optimizer_of(parameters):
    return torch.optim.Adam(parameters)

def main():
    model = {NET}
    optimizer = optimizer_of(model[3].parameters())
{textwrap.indent(LOOP, "    ")}
main()
"""
    seen, _ = watched(write(tmp_path, HEAD + source))
    first = only(seen, "unowned-grad").fix.code.splitlines()[0]
    assert first == "# model: the Sequential, which no variable was seen to name here"


def test_a_replaced_head_goes_into_the_group_of_the_old_one(tmp_path: Path) -> None:
    """Each group keeps its own learning rate, and holds nothing twice."""
    source = f"""
model = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 20), nn.Linear(20, 5))
groups = [{{"params": model[2].parameters(), "lr": 0.1}}, {{"params": model[:2].parameters(), "lr": 0.001}}]
optimizer = torch.optim.SGD(groups, momentum=0.9)
model[2], model[1].bias = nn.Linear(20, 5), nn.Parameter(torch.ones(20))
{LOOP}
"""
    path = write(tmp_path, HEAD + source)
    again, ended = watched(mended(path, only(watched(path)[0], "stale-optimizer")))
    assert (ended.code, found(again)) == (0, [])
    groups = again.record.optimizers[0].optimizer.param_groups
    names = {id(parameter): name for name, parameter in again.record.models[0].module.named_parameters()}
    held = [[names[id(parameter)] for parameter in group["params"]] for group in groups]
    assert held == [["2.weight", "2.bias"], ["0.weight", "0.bias", "1.weight", "1.bias"]]
