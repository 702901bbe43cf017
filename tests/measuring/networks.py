"""Networks for workers to load, good and bad; and the loss of one, which other processes can import."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FILE = str(Path(__file__))


def squares(outputs: Tensor) -> Tensor:
    return outputs.square().sum()


def mlp() -> nn.Sequential:
    """Linear 16-32-4 with ReLU, no biases: 2048 and 512 bytes of weights, ``0.weight`` and ``2.weight``."""
    return nn.Sequential(nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 4, bias=False))


def inputs() -> Tensor:
    """512 bytes."""
    return torch.randn(8, 16)


def target() -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    return mlp(), inputs(), squares


def talkative() -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    """Prints where the protocol would be, and reads where it would be."""
    print('{"answer": "not the worker\'s"}', flush=True)
    os.write(1, b"not the worker's\n")
    assert os.read(0, 1) == b""
    return target()


class Moody(nn.Sequential):
    """Raises while ``0.weight`` trains alone, and kills its process while ``2.weight`` does."""

    def forward(self, x: Tensor) -> Tensor:
        flags = [p.requires_grad for p in self.parameters()]
        if flags == [True, False]:
            raise LookupError("a key is gone")
        if flags == [False, True]:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)  # type: ignore[no-any-return]


def moody() -> tuple[nn.Module, Tensor, Callable[[Tensor], Tensor]]:
    """A `Moody` mlp; if FROSTLINE_TEST_CHILD names a file, with a child process whose number it writes there."""
    note = os.environ.get("FROSTLINE_TEST_CHILD")
    if note:
        with Path(note).open("a") as file:
            file.write(f"{subprocess.Popen(['sleep', '600']).pid}\n")
    return Moody(*mlp()), inputs(), squares


def cannot_load() -> Any:
    raise LookupError("the weights are gone")
