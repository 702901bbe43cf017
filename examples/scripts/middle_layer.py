"""The founding mistake, as anyone would write it: only the middle layer is to train, so Adam gets its parameters.

frostline watch examples/scripts/middle_layer.py
"""

import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 5))
criterion = nn.CrossEntropyLoss()
optimizer = torch.optim.Adam(model[2].parameters(), lr=0.01)

x = torch.randn(1, 10)
label = torch.tensor([3])

optimizer.zero_grad()
loss = criterion(model(x), label)
loss.backward()
optimizer.step()
print(f"loss {loss.item():.4f}")
