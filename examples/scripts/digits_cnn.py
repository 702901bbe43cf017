"""The same mistake with a CNN: Adam gets its two linear layers, and the convolutions are back-propagated all the same.

frostline watch examples/scripts/digits_cnn.py
"""

import torch
import torch.nn.functional as F
from torch import nn


class DigitsCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.fc1 = nn.Linear(32 * 7 * 7, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


torch.manual_seed(0)
model = DigitsCNN()
optimizer = torch.optim.Adam([*model.fc1.parameters(), *model.fc2.parameters()], lr=1e-3)

for step in range(3):
    images, labels = torch.rand(8, 3, 28, 28), torch.randint(10, (8,))
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.4f}")
