"""Scripts that look as if something were wrong, and in which nothing is: no rule may say WRONG of any of them."""

from __future__ import annotations

HEAD = """
import copy
import torch
from torch import nn
import torch.nn.functional as F
torch.manual_seed(0)
"""

LOOK_ALIKES = {
    "everything trains": """
model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
optimizer = torch.optim.Adam(model.parameters())
for _ in range(3):
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(4, 10)), torch.randint(5, (4,))).backward()
    optimizer.step()
""",
    "alternating GAN": """
G = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))
D = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
opt_g = torch.optim.Adam(G.parameters(), lr=1e-2)
opt_d = torch.optim.Adam(D.parameters(), lr=1e-2)
for _ in range(3):
    real, noise = torch.randn(8, 6), torch.randn(8, 4)
    opt_d.zero_grad()
    fake = G(noise)
    loss_d = -(F.logsigmoid(D(real)).mean() + F.logsigmoid(-D(fake.detach())).mean())
    loss_d.backward()
    opt_d.step()
    opt_g.zero_grad()
    loss_g = -F.logsigmoid(D(fake)).mean()
    loss_g.backward()
    opt_g.step()
""",
    "GAN with a frozen critic": """
G = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6))
D = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
opt_g = torch.optim.Adam(G.parameters(), lr=1e-2)
opt_d = torch.optim.Adam(D.parameters(), lr=1e-2)
for _ in range(3):
    D.requires_grad_(True)
    opt_d.zero_grad()
    with torch.no_grad():
        fake = G(torch.randn(8, 4))
    (D(fake).mean() - D(torch.randn(8, 6)).mean()).backward()
    opt_d.step()
    D.requires_grad_(False)
    opt_g.zero_grad()
    (-D(G(torch.randn(8, 4))).mean()).backward()
    opt_g.step()
""",
    "gradient accumulation": """
model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for i in range(9):
    loss = F.cross_entropy(model(torch.randn(4, 10)), torch.randint(5, (4,))) / 3
    loss.backward()
    if i % 3 == 2:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
""",
    "EMA": """
model = nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 5))
ema = copy.deepcopy(model).requires_grad_(False)
optimizer = torch.optim.Adam(model.parameters())
for _ in range(4):
    x = torch.randn(8, 10)
    with torch.no_grad():
        target = ema(x)
    optimizer.zero_grad()
    F.mse_loss(model(x), target + 1).backward()
    optimizer.step()
    with torch.no_grad():
        for a, b in zip(ema.parameters(), model.parameters()):
            a.lerp_(b, 0.1)
""",
    "evolution strategies": """
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).requires_grad_(False)
optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
x = torch.randn(64, 4)
def fitness(sign):
    for p, n in zip(model.parameters(), noise):
        p.add_(sign * n)
    return float(F.mse_loss(model(x), x.sum(1, keepdim=True)))
for _ in range(5):
    noise = [0.01 * torch.randn_like(p) for p in model.parameters()]
    slope = fitness(1) - fitness(-2)
    fitness(1)
    for p, n in zip(model.parameters(), noise):
        p.grad = slope * n
    optimizer.step()
""",
    "a mean teacher inside the model": """
class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.online = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.target = copy.deepcopy(self.online)

    def forward(self, a, b):
        with torch.no_grad():
            wanted = self.target(b)
        return F.mse_loss(self.online(a), wanted)

model = Pair()
optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
for _ in range(4):
    optimizer.zero_grad()
    model(torch.randn(16, 8), torch.randn(16, 8)).backward()
    optimizer.step()
    with torch.no_grad():
        for o, t in zip(model.online.parameters(), model.target.parameters()):
            t.lerp_(o, 0.05)
""",
    "a quantizer whose forward replaces its codes": """
class Quantizer(nn.Module):
    def __init__(self):
        super().__init__()
        self.codes = nn.Parameter(torch.randn(16, 4))

    def forward(self, x):
        chosen = F.one_hot(torch.cdist(x, self.codes).argmin(1), 16).float()
        nearest = chosen @ self.codes
        self.codes = nn.Parameter(0.9 * self.codes + 0.1 * chosen.T @ x)
        return x + (nearest - x).detach(), F.mse_loss(x, nearest.detach())

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.quantize, self.decode = nn.Linear(8, 4), Quantizer(), nn.Linear(4, 8)

    def forward(self, x):
        codes, loss = self.quantize(self.encode(x))
        return self.decode(codes), loss

model = Net()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for _ in range(5):
    x = torch.randn(32, 8)
    optimizer.zero_grad()
    again, loss = model(x)
    (F.mse_loss(again, x) + loss).backward()
    optimizer.step()
""",
    "gradients made sparse by a threshold": """
embed, head = nn.Embedding(20, 4), nn.Linear(4, 3)
embed.weight.register_hook(lambda g: torch.where(g.abs() > 0.01, g, 0.0))
optimizer = torch.optim.SGD([*embed.parameters(), *head.parameters()], lr=0.1, momentum=0.9)
for _ in range(6):
    optimizer.zero_grad()
    F.cross_entropy(head(embed(torch.randint(20, (64,)))), torch.randint(3, (64,))).backward()
    optimizer.step()
""",
    "evaluation in mid-epoch": """
model = nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20), nn.Dropout(0.5), nn.Linear(20, 5))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for i in range(6):
    if i % 2 == 0:
        model.eval()
        with torch.no_grad():
            model(torch.randn(4, 10))
        model.train()
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(4, 10)), torch.randint(5, (4,))).backward()
    optimizer.step()
""",
    "mixture of experts": """
class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(6, 4)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        gates = self.gate(x).softmax(-1)
        chosen = int(gates.mean(0).argmax())
        return self.head(self.experts[chosen](x) * gates[:, chosen, None])

model = Mixture()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(6):
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(4, 6)), torch.randint(2, (4,))).backward()
    optimizer.step()
""",
    "LoRA at step 0": """
class Adapted(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, 2))

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T

model = nn.Sequential(Adapted(nn.Linear(10, 20)), nn.ReLU(), Adapted(nn.Linear(20, 5)))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
optimizer.zero_grad()
F.cross_entropy(model(torch.randn(4, 10)), torch.randint(5, (4,))).backward()
optimizer.step()
""",
    "prompt tuning": """
body = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).requires_grad_(False)
prompt = nn.Parameter(torch.zeros(1, 6))
optimizer = torch.optim.Adam([prompt], lr=0.1)
for _ in range(3):
    optimizer.zero_grad()
    F.cross_entropy(body(torch.randn(4, 6) + prompt), torch.randint(3, (4,))).backward()
    optimizer.step()
""",
    "saliency": """
model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
optimizer = torch.optim.Adam(model.parameters())
for _ in range(2):
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(4, 10)), torch.randint(5, (4,))).backward()
    optimizer.step()
model.eval()
x = torch.randn(4, 10, requires_grad=True)
model(x)[:, 0].sum().backward()
saliency = x.grad.abs().amax(1)
""",
    "adversarial training": """
model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
optimizer = torch.optim.Adam(model.parameters())
for _ in range(3):
    x, y = torch.randn(4, 10), torch.randint(5, (4,))
    x.requires_grad_(True)
    F.cross_entropy(model(x), y).backward()
    attacked = (x + 0.1 * x.grad.sign()).detach()
    optimizer.zero_grad()
    F.cross_entropy(model(attacked), y).backward()
    optimizer.step()
""",
    "adversarial input by autograd.grad": """
model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
optimizer = torch.optim.Adam(model.parameters())
for _ in range(3):
    x, y = torch.randn(4, 10, requires_grad=True), torch.randint(5, (4,))
    (g,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
    optimizer.zero_grad()
    F.cross_entropy(model((x + 0.1 * g.sign()).detach()), y).backward()
    optimizer.step()
""",
    "warm-up from 0": """
model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 100))
for _ in range(1):
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(4, 10)), torch.randint(5, (4,))).backward()
    optimizer.step()
    scheduler.step()
""",
    "joint clipping": """
body, head = nn.Linear(10, 20), nn.Linear(20, 5)
slow = torch.optim.SGD(body.parameters(), lr=0.01)
fast = torch.optim.Adam(head.parameters(), lr=0.1)
for _ in range(3):
    slow.zero_grad()
    fast.zero_grad()
    F.cross_entropy(head(body(torch.randn(4, 10)).relu()), torch.randint(5, (4,))).backward()
    nn.utils.clip_grad_norm_([*body.parameters(), *head.parameters()], 0.1)
    slow.step()
    fast.step()
""",
    "weight tying": """
class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 30, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens)).tanh())

model = Language()
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(3):
    tokens = torch.randint(30, (2, 7))
    optimizer.zero_grad()
    F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    optimizer.step()
""",
    "rightly frozen, norms in eval mode": """
model = nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 5))
model[:3].requires_grad_(False)
model.train()
model[1].eval()
optimizer = torch.optim.Adam(model[3].parameters(), weight_decay=0.1)
for _ in range(3):
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(4, 10)), torch.randint(5, (4,))).backward()
    optimizer.step()
""",
    "frozen, and given to the optimizer": """
model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
model[0].requires_grad_(False)
optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
for _ in range(3):
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(4, 10)), torch.randint(5, (4,))).backward()
    optimizer.step()
""",
    "gradual unfreezing": """
model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 5))
model.requires_grad_(False)
model[4].requires_grad_(True)
optimizer = torch.optim.Adam(model[4].parameters())
for i in range(6):
    if i == 3:
        model[2].requires_grad_(True)
        optimizer.add_param_group({"params": model[2].parameters()})
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(4, 10)), torch.randint(5, (4,))).backward()
    optimizer.step()
""",
    "embedding with decay, and a hook that clamps": """
embed, head = nn.Embedding(20, 4), nn.Linear(4, 3)
embed.weight.register_hook(lambda g: g.clamp(-1, 1))
optimizer = torch.optim.AdamW([*embed.parameters(), *head.parameters()], weight_decay=0.1)
for _ in range(3):
    optimizer.zero_grad()
    F.cross_entropy(head(embed(torch.randint(5, (6,)))), torch.randint(3, (6,))).backward()
    optimizer.step()
""",
    "reentrant checkpoint that trains": """
from torch.utils.checkpoint import checkpoint
first, block, head = nn.Linear(10, 20), nn.Sequential(nn.Linear(20, 20), nn.ReLU()), nn.Linear(20, 5)
optimizer = torch.optim.Adam([*first.parameters(), *block.parameters(), *head.parameters()])
for _ in range(3):
    optimizer.zero_grad()
    hidden = checkpoint(block, first(torch.randn(4, 10)), use_reentrant=True)
    F.cross_entropy(head(hidden), torch.randint(5, (4,))).backward()
    optimizer.step()
""",
    "LBFGS": """
model = nn.Linear(10, 2)
x, y = torch.randn(8, 10), torch.randn(8, 2)
optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
def closure():
    optimizer.zero_grad()
    loss = F.mse_loss(model(x), y)
    loss.backward()
    return loss
for _ in range(2):
    optimizer.step(closure)
""",
    "gradient penalty": """
model = nn.Sequential(nn.Linear(4, 8), nn.Softplus(), nn.Linear(8, 1))
optimizer = torch.optim.Adam(model.parameters())
for _ in range(2):
    x = torch.randn(5, 4, requires_grad=True)
    out = model(x)
    (g,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    optimizer.zero_grad()
    (out.mean() + g.norm(2, 1).mean()).backward()
    optimizer.step()
""",
    "manual SGD of one part": """
body, head = nn.Linear(10, 20), nn.Linear(20, 5)
optimizer = torch.optim.Adam(head.parameters())
for _ in range(3):
    optimizer.zero_grad()
    body.zero_grad()
    F.cross_entropy(head(body(torch.randn(4, 10)).relu()), torch.randint(5, (4,))).backward()
    optimizer.step()
    with torch.no_grad():
        for p in body.parameters():
            p -= 0.01 * p.grad
""",
    "adaptive batch norm": """
model = nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 5))
model.requires_grad_(False)
model.train()
for _ in range(3):
    model(torch.randn(4, 10))
""",
    "target network": """
policy = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
target = copy.deepcopy(policy)
optimizer = torch.optim.Adam(policy.parameters())
for i in range(5):
    state, after = torch.randn(8, 4), torch.randn(8, 4)
    with torch.no_grad():
        wanted = 1 + 0.9 * target(after).amax(1)
    optimizer.zero_grad()
    F.smooth_l1_loss(policy(state).amax(1), wanted).backward()
    optimizer.step()
    if i % 2:
        target.load_state_dict(policy.state_dict())
""",
    "GradScaler": """
model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scaler = torch.amp.GradScaler("cpu")
for _ in range(3):
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(torch.randn(4, 10)), torch.randint(5, (4,)))
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
""",
    "a frozen body over augmented samples": """
model = nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 5))
model[:3].requires_grad_(False)
inputs, labels = torch.randn(12, 8), torch.randint(5, (12,))
optimizer = torch.optim.Adam(model[4].parameters())
for _ in range(6):
    optimizer.zero_grad()
    F.cross_entropy(model(inputs + 0.01 * torch.randn(12, 8)), labels).backward()
    optimizer.step()
""",
    "a frozen body, one epoch, and evaluations on the same samples": """
model = nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 5))
model[:3].requires_grad_(False)
held_out = torch.randn(12, 8)
optimizer = torch.optim.Adam(model[4].parameters())
for _ in range(6):
    with torch.no_grad():
        model(held_out)
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(4, 8)), torch.randint(5, (4,))).backward()
    optimizer.step()
""",
    "an encoder under no_grad, one epoch, and evaluations on the same samples": """
encoder, head = nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 256)).eval(), nn.Linear(256, 5)
held_out = torch.randn(12, 8)
optimizer = torch.optim.Adam(head.parameters())
for _ in range(6):
    with torch.no_grad():
        head(encoder(held_out))
        features = encoder(torch.randn(4, 8))
    optimizer.zero_grad()
    F.cross_entropy(head(features), torch.randint(5, (4,))).backward()
    optimizer.step()
""",
    "a cheap frozen convolution over the same samples": """
model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 5))
model[0].requires_grad_(False)
images, labels = torch.randn(6, 1, 12, 12), torch.randint(5, (6,))
optimizer = torch.optim.Adam(model[3].parameters())
for _ in range(4):
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()
""",
    "a teacher that follows its student, on the same samples": """
student = nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 5))
teacher = copy.deepcopy(student).requires_grad_(False)
inputs, labels = torch.randn(12, 8), torch.randint(5, (12,))
optimizer = torch.optim.Adam(student.parameters())
for _ in range(4):
    with torch.no_grad():
        wanted = teacher(inputs).softmax(-1)
    optimizer.zero_grad()
    logits = student(inputs)
    (F.cross_entropy(logits, labels) + F.cross_entropy(logits, wanted)).backward()
    optimizer.step()
    with torch.no_grad():
        for a, b in zip(teacher.parameters(), student.parameters()):
            a.lerp_(b, 0.1)
""",
    "an encoder that is thawed later, on the same samples": """
model = nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 5))
inputs, labels = torch.randn(12, 8), torch.randint(5, (12,))
model[:3].requires_grad_(False)
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
for i in range(6):
    model[:3].requires_grad_(i > 2)
    optimizer.zero_grad()
    F.cross_entropy(model(inputs), labels).backward()
    optimizer.step()
""",
    "a hook that needs a gradient, in the forward": """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        z = torch.tanh(self.body(x))
        z.register_hook(lambda gradient: 1.1 * gradient)
        return self.head(z)

model = Net()
optimizer = torch.optim.Adam(model.parameters())
for _ in range(3):
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(8, 8)), torch.randint(2, (8,))).backward()
    optimizer.step()
""",
}

TRANSFORMED = {
    "plain gradients": """
from torch.func import functional_call, grad_and_value
model = nn.Linear(4, 1)
weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
def loss(weights, x, y):
    return F.mse_loss(functional_call(model, weights, (x,)), y)
for _ in range(3):
    gradient, _ = grad_and_value(loss)(weights, torch.randn(8, 4), torch.randn(8, 1))
    weights = {name: weight - 0.1 * gradient[name] for name, weight in weights.items()}
print(float(sum(weight.detach().sum() for weight in weights.values())))
""",
    "an ensemble": """
from torch.func import functional_call, stack_module_state, vmap
models = [nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)) for _ in range(3)]
weights, buffers = stack_module_state(models)
base = copy.deepcopy(models[0])
optimizer = torch.optim.Adam(list(weights.values()))
for _ in range(3):
    optimizer.zero_grad()
    run = vmap(lambda w, b, x: functional_call(base, (w, b), (x,)), (0, 0, None))
    F.cross_entropy(run(weights, buffers, torch.randn(8, 8)).flatten(0, 1), torch.randint(2, (24,))).backward()
    optimizer.step()
print(float(sum(weight.detach().sum() for weight in weights.values())))
""",
    "a gradient for each sample": """
from torch.func import functional_call, grad, vmap
model = nn.Linear(8, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
def loss(weights, x, y):
    return F.cross_entropy(functional_call(model, weights, (x[None],)), y[None])
for _ in range(3):
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    gradients = vmap(grad(loss), (None, 0, 0))(weights, torch.randn(8, 8), torch.randint(2, (8,)))
    for name, weight in model.named_parameters():
        weight.grad = gradients[name].clamp(-0.1, 0.1).mean(0)
    optimizer.step()
print(float(sum(weight.detach().sum() for weight in model.parameters())))
""",
}
