"""Several processes: rank 0 reports, weights are those of without us, and ranks that train apart are a finding."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.watching.watching import write

RANKS = """
import sys, torch
import torch.distributed as dist
from torch import nn
import torch.nn.functional as F

mode, folder = sys.argv[1:]
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20), nn.ReLU())
        self.one, self.other = nn.Linear(20, 5), nn.Linear(20, 5)

    def forward(self, x):
        hidden = self.body(x)
        if mode == "unused":
            return self.one(hidden) if rank else self.other(hidden)
        return self.one(hidden) + self.other(hidden)

model = Net()
if mode == "thawed":
    model.body[0].requires_grad_(False)
net = model
if mode != "apart":
    net = nn.parallel.DistributedDataParallel(
        model, broadcast_buffers=False, find_unused_parameters=mode == "unused"
    )
model.requires_grad_(True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
torch.manual_seed(rank)
for step in range(4):
    if mode == "fails" and rank == 1 and step == 3:
        raise ValueError("rank 1 fails")
    loss = F.cross_entropy(net(torch.randn(4, 10)), torch.randint(5, (4,)))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print("done")
torch.save(model.state_dict(), f"{folder}/{rank}.pt")
if mode != "open":
    dist.destroy_process_group()
"""


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    for _ in range(4):
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        if "SIGABRT" not in done.stderr:
            break  # (gloo aborts now and then as a process ends, watched or not)
    return done


def in_two(tmp_path: Path, mode: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Watch the script in two processes; the report is one, and its data come back."""
    path, folder = write(tmp_path, RANKS), tmp_path / "watched"
    folder.mkdir()
    report = tmp_path / "found.json"
    done = torchrun("-m", "frostline", "watch", "--json", str(report), str(path), mode, str(folder))
    assert len(re.findall(r"^watched\s", done.stderr, re.MULTILINE)) == 1
    return done, json.loads(report.read_text())


@pytest.mark.parametrize("mode", ["fine", "unused", "open"])
def test_ranks_that_train_together_give_no_finding_and_the_same_weights(mode: str, tmp_path: Path) -> None:
    done, data = in_two(tmp_path, mode)
    assert done.returncode == 0, done.stderr
    assert done.stdout.replace("\n", "") == "done" * 2  # (the two may write into one line)
    assert [finding["rule"] for finding in data["findings"]] == []
    assert data["notes"] == []
    assert data["now"]["step_flops"] > 0
    plain = tmp_path / "plain"
    plain.mkdir()
    assert torchrun(str(tmp_path / "train.py"), mode, str(plain)).returncode == 0
    for rank in range(2):
        weights, same = torch.load(plain / f"{rank}.pt"), torch.load(tmp_path / "watched" / f"{rank}.pt")
        assert all(torch.equal(weights[key], same[key]) for key in weights)


@pytest.mark.parametrize(
    ("mode", "evidence"),
    [("apart", "no DistributedDataParallel is around it"), ("thawed", "made while these required no grad")],
)
def test_ranks_that_train_apart_are_a_finding(mode: str, evidence: str, tmp_path: Path) -> None:
    done, data = in_two(tmp_path, mode)
    assert done.returncode == 0, done.stderr
    (finding,) = data["findings"]
    one, other = (torch.load(tmp_path / "watched" / f"{rank}.pt") for rank in range(2))
    differ = [key for key in one if "running" not in key and not torch.equal(one[key], other[key])]
    assert finding["rule"] == "ranks-differ"
    assert finding["level"] == "WRONG"
    assert finding["parameters"] == differ
    assert any(evidence in each for each in finding["evidence"])
    assert f"norm {one[differ[0]].double().norm():.9g} on rank 0" in finding["evidence"][1]
    assert f"{other[differ[0]].double().norm():.9g} on rank 1" in finding["evidence"][1]


def test_a_rank_that_fails_ends_all(tmp_path: Path) -> None:
    path = write(tmp_path, RANKS)
    done = torchrun("-m", "frostline", "watch", str(path), "fails", str(tmp_path))
    assert done.returncode == 1
    assert "ValueError: rank 1 fails" in done.stderr
