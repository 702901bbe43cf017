"""Recurrent networks."""

from __future__ import annotations

import torch
from tests.cases import Case, case
from tests.zoo.dense import mean_square
from torch import Tensor, nn
from torch.nn import functional


class SequenceClassifier(nn.Module):
    def __init__(self, core: nn.Module, width: int, *, packed: bool = False) -> None:
        super().__init__()
        self.embedding, self.core, self.head = nn.Embedding(12, 6), core, nn.Linear(width, 3)
        self.packed = packed

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        if self.packed:
            lengths = torch.tensor([5, 4, 2])
            x = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
            y, _ = nn.utils.rnn.pad_packed_sequence(self.core(x)[0], batch_first=True)
        else:
            y, _ = self.core(x)
        return self.head(y.mean(1))


def recurrent_case(core: nn.Module, width: int, *, packed: bool = False) -> Case:
    labels = torch.randint(0, 3, (3,))
    model = SequenceClassifier(core, width, packed=packed)
    return Case(model, torch.randint(0, 12, (3, 5)), lambda out: functional.cross_entropy(out, labels))


@case()
def lstm_classifier() -> Case:
    return recurrent_case(nn.LSTM(6, 7, num_layers=2, batch_first=True), 7)


@case()
def lstm_dropout() -> Case:
    return recurrent_case(nn.LSTM(6, 7, num_layers=2, batch_first=True, dropout=0.4), 7)


@case()
def gru_bidirectional() -> Case:
    return recurrent_case(nn.GRU(6, 5, batch_first=True, bidirectional=True), 10)


@case()
def rnn_vanilla() -> Case:
    return recurrent_case(nn.RNN(6, 8, num_layers=2, batch_first=True), 8)


@case()
def lstm_packed() -> Case:
    return recurrent_case(nn.LSTM(6, 7, batch_first=True), 7, packed=True)


class CellLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.head = nn.LSTMCell(4, 6), nn.GRUCell(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        hidden = x.new_zeros(x.shape[0], 5)
        for t in range(x.shape[1]):
            state = self.lstm(x[:, t], state)
            hidden = self.gru(state[0], hidden)
        return self.head(hidden)


@case()
def recurrent_cells() -> Case:
    return Case(CellLoop(), torch.randn(2, 4, 4), mean_square)
