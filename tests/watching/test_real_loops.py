"""Loops that nobody shaped around the tool: nothing wrong is found in them, and their weights are those of without."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from tests.watching.watching import found, mended, only, plainly, watched, write

TRAINER = """
import sys, torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

mode, folder = sys.argv[1:]
torch.manual_seed(0)
config = BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
                    max_position_embeddings=32)
model = BertForSequenceClassification(config)
if mode.startswith("lora"):
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS"))
elif mode == "frozen":
    for parameter in model.bert.parameters():
        parameter.requires_grad = False
data = [{"input_ids": torch.randint(100, (12,)), "labels": torch.tensor(i % 2)} for i in range(24)]
if "checkpoint" in mode:
    model.gradient_checkpointing_enable({"use_reentrant": "reentrant" in mode})
    model.enable_input_require_grads()
arguments = TrainingArguments(folder, per_device_train_batch_size=8, max_steps=3, report_to=[], save_strategy="no",
                              logging_strategy="no", disable_tqdm=True, use_cpu=True)
Trainer(model=model, args=arguments, train_dataset=data).train()
torch.save(model.state_dict(), f"{folder}/{mode}.pt")
"""

ACCELERATE = """
import sys, torch
from torch import nn
from accelerate import Accelerator

torch.manual_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = nn.Sequential(nn.Linear(10, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))
optimizer = torch.optim.AdamW(model.parameters())
data = torch.utils.data.DataLoader([(torch.randn(10), i % 3) for i in range(24)], batch_size=4)
model, optimizer, data = accelerator.prepare(model, optimizer, data)
for x, y in data:
    with accelerator.accumulate(model):
        loss = nn.functional.cross_entropy(model(x), y)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
torch.save(model.state_dict(), f"{sys.argv[2]}/{sys.argv[1]}.pt")
"""

TIMM = """
import sys, torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return x + self.bn(self.conv(x)).relu()

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.blocks = nn.Sequential(*(Block(8) for _ in range(4)))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))

def freeze(module):
    for parameter in module.parameters():
        parameter.requires_grad = False
    for each in module.modules():
        if isinstance(each, nn.BatchNorm2d):
            each.eval()

torch.manual_seed(0)
model = Net()
optimizer = torch.optim.SGD([p for p in model.parameters()], lr=0.1, momentum=0.9, weight_decay=1e-4)
model.train()
freeze(model.stem), freeze(model.blocks[:2])
for epoch in range(2):
    for _ in range(3):
        loss = nn.functional.cross_entropy(model(torch.randn(4, 3, 16, 16)), torch.randint(5, (4,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        model(torch.randn(4, 3, 16, 16))
    model.train()
    freeze(model.stem), freeze(model.blocks[:2])
torch.save(model.state_dict(), f"{sys.argv[2]}/{sys.argv[1]}.pt")
"""

LIGHTNING = """
import sys, torch
import pytorch_lightning as pl
from torch import nn
from pytorch_lightning.callbacks import BaseFinetuning

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        blocks = [nn.Sequential(nn.LazyConv2d(16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()) for _ in range(6)]
        self.backbone = nn.Sequential(*blocks)
        self.backbone(torch.randn(2, 3, 12, 12))
        self.head = nn.Linear(16, 200)

    def training_step(self, batch, number):
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.backbone(x).mean((2, 3))), y)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad])

class Finetuning(BaseFinetuning):
    def freeze_before_training(self, net):
        self.freeze(net.backbone, **({} if sys.argv[1] == "lightning" else {"train_bn": False}))

    def finetune_function(self, net, epoch, optimizer):
        pass

pl.seed_everything(0)
data = torch.utils.data.DataLoader([(torch.randn(3, 12, 12), n) for n in range(16)], batch_size=4, shuffle=True)
net = Net()
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[Finetuning()], **quiet)
trainer.fit(net, data)
torch.save(net.state_dict(), f"{sys.argv[2]}/{sys.argv[1]}.pt")
"""

LOOPS = {
    "plain": (TRAINER, "transformers", []),
    "lora": (TRAINER, "peft", []),
    "lora-checkpoint": (TRAINER, "peft", []),
    "lora-checkpoint-reentrant": (TRAINER, "peft", []),
    "frozen": (TRAINER, "transformers", ["stochastic-frozen"]),
    "accelerate": (ACCELERATE, "accelerate", []),
    "timm": (TIMM, "torch", []),
    "lightning": (LIGHTNING, "pytorch_lightning", ["early-param-forces-backward"]),
    "lightning-train_bn-off": (LIGHTNING, "pytorch_lightning", []),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LOOPS)
def test_the_weights_are_bit_for_bit_those_of_an_unwatched_run(name: str, tmp_path: Path) -> None:
    source, needs, expected = LOOPS[name]
    if importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not here")
    path = write(tmp_path, source)
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    plain.mkdir()
    ours.mkdir()
    plainly(path, name, str(plain))
    seen, ended = watched(path, name, str(ours))
    assert (ended.code, seen.notes) == (0, [])
    weights, same = torch.load(plain / f"{name}.pt"), torch.load(ours / f"{name}.pt")
    assert weights.keys() == same.keys()
    assert all(torch.equal(weights[key], same[key]) for key in weights)
    assert found(seen) == expected
    assert seen.now is not None
    assert seen.who_trains()[0]["moved"] > 0


COMPILED = """
import sys, torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
optimizer = torch.optim.Adam(model[2].parameters())
kind = sys.argv[1]
if kind == "compile":
    run = torch.compile(model, backend="eager")
elif kind == "compile in place":
    model.compile(backend="eager")
    run = model
elif kind == "script":
    run = torch.jit.script(model)
else:
    run = torch.jit.trace(model, torch.randn(4, 10))
for _ in range(3):
    optimizer.zero_grad()
    nn.functional.cross_entropy(run(torch.randn(4, 10)), torch.randint(5, (4,))).backward()
    optimizer.step()
weights = model.state_dict()
"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["compile", "compile in place", "script", "trace"])
def test_a_compiled_model_trains_as_without_and_what_was_not_seen_is_said(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path, COMPILED + "\ntorch.save(weights, sys.argv[2])\n")
    torch._dynamo.reset()
    plainly(path, kind, str(tmp_path / "plain.pt"))
    torch._dynamo.reset()
    seen, ended = watched(path, kind, str(tmp_path / "ours.pt"))
    assert ended.code == 0
    weights, same = torch.load(tmp_path / "plain.pt"), torch.load(tmp_path / "ours.pt")
    assert all(torch.equal(weights[key], same[key]) for key in weights)
    assert found(seen) == ["unowned-grad"]
    assert any("compiled" in note or "scripted" in note for note in seen.notes)


@pytest.mark.filterwarnings("ignore")
def test_the_default_of_lightnings_finetuning_is_costed(tmp_path: Path) -> None:
    """``train_bn=True``: norms go on training. With the fix as printed the step is what was said, run by itself."""
    pytest.importorskip("pytorch_lightning")
    path = write(tmp_path, LIGHTNING)
    finding = only(watched(path, "lightning", str(tmp_path))[0], "early-param-forces-backward")
    assert all(".1." in name for name in finding.parameters)
    again = watched(mended(path, finding), "lightning", str(tmp_path))[0]
    assert found(again) == ["frozen-norm-drift"]  # (rightly: they are frozen now, and still in train mode)
    assert again.now is not None
    assert finding.now is not None
    assert finding.fixed is not None
    assert again.now.step_flops == finding.fixed.step_flops < 0.6 * finding.now.step_flops
    assert again.now.saved_bytes == finding.fixed.saved_bytes
