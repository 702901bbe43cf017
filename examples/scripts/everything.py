"""The network of ``middle_layer.py`` with everything trained: nothing to find.

frostline watch examples/scripts/everything.py
"""

import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 5))
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

x = torch.randn(1, 10)
label = torch.tensor([3])

optimizer.zero_grad()
loss = criterion(model(x), label)
loss.backward()
optimizer.step()
print(f"loss {loss.item():.4f}")
