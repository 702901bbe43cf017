"""Scripts with one fault each: the rule that is to find it, and the parameters that it is about."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """``also``: other rules that rightly find something in it. ``after``: what the mended script ends with."""

    rule: str
    parameters: tuple[str, ...]
    source: str
    also: tuple[str, ...] = ()
    after: str = ""


FAULTS = {
    "frozen batch norm in train mode": Fault(
        "frozen-norm-drift",
        ("1.running_mean", "1.running_var", "1.num_batches_tracked"),
        """
model = nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 5))
model[:3].requires_grad_(False)
optimizer = torch.optim.Adam(model[3].parameters())
for _ in range(3):
    model.train()
    optimizer.zero_grad()
    loss = F.cross_entropy(model(torch.randn(4, 10)), torch.randint(5, (4,)))
    loss.backward()
    optimizer.step()
""",
    ),
    "frozen encoder called apart, in train mode": Fault(
        "frozen-norm-drift",
        ("encoder.1.running_mean", "encoder.1.running_var", "encoder.1.num_batches_tracked"),
        """
encoder = nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20)).requires_grad_(False)
head = nn.Linear(20, 5)
optimizer = torch.optim.Adam(head.parameters())
for _ in range(3):
    optimizer.zero_grad()
    with torch.no_grad():
        features = encoder(torch.randn(4, 10))
    F.cross_entropy(head(features), torch.randint(5, (4,))).backward()
    optimizer.step()
""",
    ),
    "spectral norm over a frozen weight": Fault(
        "frozen-norm-drift",
        ("0.parametrizations.weight.0._u", "0.parametrizations.weight.0._v"),
        """
model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(10, 20)), nn.ReLU(), nn.Linear(20, 5))
model[0].requires_grad_(False)
optimizer = torch.optim.Adam(model[2].parameters())
for _ in range(3):
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(4, 10)), torch.randint(5, (4,))).backward()
    optimizer.step()
""",
    ),
    "a detached branch": Fault(
        "never-updated",
        ("body.weight", "body.bias"),
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(10, 20), nn.Linear(20, 5)

    def forward(self, x):
        return self.head(self.body(x).detach().relu())

model = Net()
optimizer = torch.optim.Adam(model.parameters())
for _ in range(4):
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(4, 10)), torch.randint(5, (4,))).backward()
    optimizer.step()
""",
    ),
    "a head that is never called": Fault(
        "never-updated",
        ("spare.weight", "spare.bias"),
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head, self.spare = nn.Linear(10, 20), nn.Linear(20, 5), nn.Linear(20, 3)

    def forward(self, x):
        return self.head(self.body(x).relu())

model = Net()
optimizer = torch.optim.Adam(model.parameters())
for _ in range(4):
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(4, 10)), torch.randint(5, (4,))).backward()
    optimizer.step()
""",
    ),
    "no_grad around what should train": Fault(
        "grad-off-over-trainable",
        ("encoder.weight", "encoder.bias"),
        """
encoder, head = nn.Linear(10, 20), nn.Linear(20, 5)
optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()])
for _ in range(3):
    optimizer.zero_grad()
    with torch.no_grad():
        features = encoder(torch.randn(4, 10))
    F.cross_entropy(head(features), torch.randint(5, (4,))).backward()
    optimizer.step()
""",
    ),
    "reentrant checkpoint behind data": Fault(
        "checkpoint-blocks-grad",
        ("block.0.weight", "block.0.bias"),
        """
from torch.utils.checkpoint import checkpoint

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(10, 20), nn.ReLU())
        self.head = nn.Linear(20, 5)

    def forward(self, x):
        hidden = checkpoint(self.block, x, use_reentrant=True)
        return self.head(hidden)

model = Net()
optimizer = torch.optim.Adam(model.parameters())
for _ in range(3):
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(4, 10)), torch.randint(5, (4,))).backward()
    optimizer.step()
""",
    ),
    "frozen in mid-training, gradients set to zero": Fault(
        "frozen-moved",
        ("0.weight", "0.bias"),
        """
model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for i in range(5):
    if i == 3:
        model[0].requires_grad_(False)
    optimizer.zero_grad(set_to_none=False)
    F.cross_entropy(model(torch.randn(4, 10)), torch.randint(5, (4,))).backward()
    optimizer.step()
""",
    ),
    "requires_grad set on a module": Fault(
        "freeze-missed",
        ("0.weight", "0.bias"),
        """
model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
model[0].requires_grad = False
optimizer = torch.optim.Adam(model.parameters())
for _ in range(2):
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(4, 10)), torch.randint(5, (4,))).backward()
    optimizer.step()
""",
    ),
    "require_grad misspelt": Fault(
        "freeze-missed",
        ("0.weight", "0.bias"),
        """
model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
for p in model[0].parameters():
    p.require_grad = False
optimizer = torch.optim.Adam(model.parameters())
for _ in range(2):
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(4, 10)), torch.randint(5, (4,))).backward()
    optimizer.step()
""",
    ),
    "clipping over all, the optimizer owns the head": Fault(
        "clip-covers-unowned",
        ("0.weight", "0.bias"),
        """
model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
for _ in range(3):
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(4, 10)), torch.randint(5, (4,))).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
""",
        also=("unowned-grad",),
    ),
    "head replaced after the optimizer was made": Fault(
        "stale-optimizer",
        ("1.weight", "1.bias"),
        """
model = nn.Sequential(nn.Linear(10, 20), nn.Linear(20, 5))
optimizer = torch.optim.Adam(model.parameters())
model[1] = nn.Linear(20, 5)
for _ in range(3):
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(4, 10)), torch.randint(5, (4,))).backward()
    optimizer.step()
""",
    ),
    "new tokens by a gradient mask, with weight decay": Fault(
        "partial-mask-leak",
        ("embed.weight",),
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 6), nn.Linear(6, 12)

    def forward(self, tokens):
        return self.head(self.embed(tokens))

model = Net()
model.head.requires_grad_(False)
mask = torch.zeros(12, 1)
mask[10:] = 1
model.embed.weight.register_hook(lambda grad: grad * mask)
optimizer = torch.optim.AdamW(model.embed.parameters(), weight_decay=0.1)
for _ in range(3):
    tokens = torch.randint(12, (3, 8))
    optimizer.zero_grad()
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
    optimizer.step()
""",
    ),
    "the optimizer gets one layer": Fault(
        "unowned-grad",
        ("0.weight", "0.bias"),
        """
model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
optimizer = torch.optim.Adam(
    model[2].parameters(),
    lr=0.1,
)
for _ in range(2):
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(4, 10)), torch.randint(5, (4,))).backward()
    optimizer.step()
""",
    ),
    "dropout on in the frozen encoder": Fault(
        "stochastic-frozen",
        (),
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(10, 20), nn.Dropout(0.3), nn.ReLU())
        self.head = nn.Linear(20, 5)

    def forward(self, x):
        return self.head(self.encoder(x))

model = Net()
model.encoder.requires_grad_(False)
optimizer = torch.optim.Adam(model.head.parameters())
for _ in range(2):
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(4, 10)), torch.randint(5, (4,))).backward()
    optimizer.step()
""",
    ),
    "a norm at the start of a frozen network": Fault(
        "early-param-forces-backward",
        ("norm.weight", "norm.bias"),
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.body = nn.Sequential(*(nn.Linear(32, 32) for _ in range(8)))
        self.head = nn.Linear(32, 40)

    def forward(self, x):
        return self.head(self.body(self.norm(x)))

model = Net()
model.body.requires_grad_(False)
optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
for _ in range(2):
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(64, 32)), torch.randint(40, (64,))).backward()
    optimizer.step()
""",
    ),
    "inputs made to require grad": Fault(
        "forced-input-grad",
        (),
        """
from transformers import BertConfig, BertForSequenceClassification
config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
                    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
model = BertForSequenceClassification(config)
model.bert.requires_grad_(False)
model.bert.encoder.layer[3].requires_grad_(True)
model.enable_input_require_grads()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
for _ in range(2):
    optimizer.zero_grad()
    model(input_ids=torch.randint(50, (4, 12)), labels=torch.randint(2, (4,))).loss.backward()
    optimizer.step()
""",
    ),
    "a head alone, tied to the embedding": Fault(
        "tied-surprise",
        ("embed.weight",),
        """
class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(60, 32)
        self.body = nn.Sequential(*(nn.Linear(32, 32) for _ in range(8)))
        self.head = nn.Linear(32, 60, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens)))

model = Language()
model.body.requires_grad_(False)
optimizer = torch.optim.AdamW(model.head.parameters())
for _ in range(2):
    tokens = torch.randint(60, (4, 9))
    optimizer.zero_grad()
    F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    optimizer.step()
""",
    ),
    "frozen convolutions behind a trained first one": Fault(
        "unneeded-saved-tensors",
        (),
        """
model = nn.Sequential(
    nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
    nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
)
model.requires_grad_(False)
model[0].requires_grad_(True)
optimizer = torch.optim.Adam(model[0].parameters())
for _ in range(2):
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(8, 3, 32, 32)), torch.randint(5, (8,))).backward()
    optimizer.step()
""",
        after="run.close()",
    ),
    "a frozen body over the same samples": Fault(
        "cacheable-prefix",
        (),
        """
model = nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 5))
model[:3].requires_grad_(False)
inputs, labels = torch.randn(12, 8), torch.randint(5, (12,))
optimizer = torch.optim.Adam(model[4].parameters())
for _ in range(4):
    optimizer.zero_grad()
    F.cross_entropy(model(inputs), labels).backward()
    optimizer.step()
""",
    ),
    "an encoder under no_grad over the same samples": Fault(
        "cacheable-prefix",
        (),
        """
encoder, head = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3)).eval(), nn.Linear(32, 5)
images, labels = torch.randn(6, 3, 12, 12), torch.randint(5, (6,))
optimizer = torch.optim.Adam(head.parameters())
for _ in range(4):
    with torch.no_grad():
        features = encoder(images)
    loss = F.cross_entropy(head(features.mean((2, 3))), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
""",
    ),
}
