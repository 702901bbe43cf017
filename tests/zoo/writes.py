"""In-place writes, views and buffers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tests.cases import Case, case
from tests.zoo.dense import mean_square
from torch import Tensor, nn


class WritesIntoViews(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.column, self.shift = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y[:, 0].mul_(self.column)
        y[:, 2:4].add_(self.shift)
        y = self.b(y)
        y[:, :2] = torch.tanh(y[:, 2:4].clone())
        y[:, -1].mul_(y[:, 0].detach().clone())
        y[:, 4:].relu_()
        return self.head(y)


@case()
def writes_into_views() -> Case:
    return Case(WritesIntoViews(), torch.randn(4, 6), mean_square)


class InPlaceActivations(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            y = layer(x).add_(x)
            x = y.relu_() if i % 2 else y.sigmoid_()
        return x.clone().mul_(self.scale).sub_(1)


@case()
def in_place_activations() -> Case:
    return Case(InPlaceActivations(), torch.randn(4, 6), mean_square)


class DropsInPlace(nn.Module):
    """Dropout that writes to a view of a layer's result, once behind an activation that does; and to no view."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.layers[0](x).flatten(0, 1), 0.4, inplace=True)
        x = F.dropout(F.hardtanh(self.layers[1](x)[:, :4], 0, 6, inplace=True), 0.4, inplace=True)
        x = F.dropout(self.layers[2](F.pad(x, (1, 1))), 0.4, inplace=True)
        return self.layers[3](x)


@case()
def dropout_in_place() -> Case:
    return Case(DropsInPlace(), torch.randn(3, 4, 6), mean_square)


class FillsABuffer(nn.Module):
    """Several layers write their slices of one zeros tensor, some before and some after it was read."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 3) for _ in range(3))
        self.row, self.head = nn.Parameter(torch.rand(9)), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        canvas = torch.zeros(x.shape[0] + 1, 9)
        canvas[0] = self.row
        for i, layer in enumerate(self.layers):
            canvas[1:, 3 * i : 3 * i + 3] = layer(x)
        return self.head(canvas)


@case()
def fills_a_canvas() -> Case:
    return Case(FillsABuffer(), torch.randn(4, 5), mean_square)


class IndexWrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.rows, self.head = nn.Linear(4, 6), nn.Parameter(torch.rand(2, 6)), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        y = y.index_copy(0, torch.tensor([1, 3]), self.rows)
        y[torch.tensor([0, 2])] = torch.relu(y[torch.tensor([2, 4])])
        y = y.masked_fill(y > 2, 0.0)
        y = y.scatter_add(1, torch.zeros(5, 1, dtype=torch.long), y[:, :1])
        return self.head(y)


@case()
def index_writes() -> Case:
    return Case(IndexWrites(), torch.randn(5, 4), mean_square)


class RunningStatistics(nn.Module):
    """A buffer that the forward reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        with torch.no_grad():
            self.mean.mul_(0.9).add_(y.mean(0), alpha=0.1)
        return self.after((y - self.mean.clone()).relu())


@case()
def buffer_written_in_forward() -> Case:
    return Case(RunningStatistics(), torch.randn(5, 4), mean_square)


class FixedMaps(nn.Module):
    """Buffers that ``state_dict`` saves and backward reads: a projection, a scale, filters, where to look."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Parameter(torch.randn(5, 6)), nn.Linear(6, 3)
        self.register_buffer("projection", torch.randn(6, 6))
        self.register_buffer("scale", torch.rand(6))
        self.register_buffer("filters", torch.randn(6, 1, 3))
        self.register_buffer("places", torch.tensor([0, 2, 2, 4]))

    def forward(self, x: Tensor) -> Tensor:
        y = (x @ self.projection + self.table[self.places]) * self.scale
        return self.head(F.conv1d(y.unsqueeze(-1), self.filters, padding=1, groups=6).squeeze(-1).tanh())


@case()
def buffers_read_in_forward() -> Case:
    model = nn.Sequential(nn.Linear(4, 6), FixedMaps(), nn.Linear(3, 2))
    return Case(model, torch.randn(4, 4), mean_square)
