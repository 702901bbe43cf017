"""Microscope images of cell nuclei with masks, read from a file that the user has.

An ``.npz`` with ``x`` uint8 (n, 128, 128, 3), ``y`` uint8 (n, 128, 16), the masks with their bits packed along the last
axis, and ``kind`` of each image: the 2018 Data Science Bowl's stage-1 training set (Broad Bioimage Benchmark Collection
BBBC038v1, CC0), cut and resized.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FLUORESCENCE, TISSUE = "gray-dark", "col-bright"


@dataclass(frozen=True)
class Cells:
    """Images (B, 3, H, W) as the pretrained encoder takes them, ``(pixel - 127) / 128``; masks (B, H, W) of 0 and 1."""

    images: Tensor
    masks: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def cut(self, start: int, end: int | None = None) -> Cells:
        return Cells(self.images[start:end], self.masks[start:end])

    def take(self, indices: Tensor) -> Cells:
        return Cells(self.images[indices], self.masks[indices])


def read(path: Path, kind: str) -> Cells:
    """The images of one kind, in an order that does not depend on the file's (a fixed shuffle)."""
    with np.load(path) as file:
        chosen = np.flatnonzero(file["kind"] == kind)
        chosen = np.random.default_rng(0).permutation(chosen)
        pixels, packed = file["x"][chosen], file["y"][chosen]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().sub(127).div(128).contiguous()
    masks = torch.from_numpy(np.unpackbits(packed, axis=-1)).float()
    return Cells(images, masks)
