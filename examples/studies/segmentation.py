"""Fluorescence to stained tissue: ``python -m examples.studies.segmentation IMAGES [ROW ...] [--layers] [--write]``.

A U-Net on the pretrained EfficientNet-Lite0 is trained on fluorescence images, once. Then it is adapted with 30 images
of stained tissue, by one subset of its parameters after the other; see `examples.studies.study` for what is run and
kept, and `examples.studies.cells` for the file.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.studies import cells, study, unet
from examples.studies.cells import Cells
from examples.studies.task import Batch, Settings, Task, cache_folder
from examples.studies.training import source_trained

BATCH = 5
SETTINGS = Settings(epochs=16, rates=(5e-4, 3e-3, 2e-2), seeds=(0, 1, 2), points=4)
SHORT = Settings(epochs=1, rates=(5e-4,), seeds=(0,), points=1)


class Segmentation(Task):
    """Which pixels are nuclei? A U-Net on the pretrained EfficientNet-Lite0, trained on 481 fluorescence images, is
    adapted with 30 images of stained tissue, which each seed draws from 45; 17 others are the validation, 45 the test.
    60 fluorescence images show what is forgotten. The statistics of all batch norms are estimated anew from the 30
    images before any row begins, and then stay (eval mode): so it is for every row."""

    name = "segmentation"
    title = "Segmentation: fluorescence to stained tissue"
    metric = "Dice"
    higher = "Dice on held-out tissue"
    batch_size = BATCH
    last = {  # noqa: RUF012
        "last 1": ["ups.3", "head"],
        "last 2": ["ups.2", "ups.3", "head"],
        "last 4, the way up": ["ups", "head"],
        "last 5": "@last:1",  # with the encoder's last block
    }

    def __init__(self, path: Path, settings: Settings | None = None, *, short: bool = False) -> None:
        self.path = path
        self.settings = settings or (SHORT if short else SETTINGS)
        self.short = short
        self.num_examples = 10 if short else 30

    # -- data ----------------------------------------------------------------------------------------------------------

    @cached_property
    def _parts(self) -> dict[str, Cells]:
        tissue, fluorescence = cells.read(self.path, cells.TISSUE), cells.read(self.path, cells.FLUORESCENCE)
        parts = {
            "test": tissue.cut(0, 45),
            "validation": tissue.cut(45, 62),
            "pool": tissue.cut(62),
            "fluorescence": fluorescence.cut(0, 60),
            "fluorescence training": fluorescence.cut(60),
        }
        return {name: part.cut(0, 10) for name, part in parts.items()} if self.short else parts

    def examples(self, seed: int) -> Cells:
        pool = self._parts["pool"]
        return pool.take(torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[: self.num_examples])

    def batches(self, examples: Cells, generator: torch.Generator) -> Iterator[Batch]:
        for chosen in torch.randperm(len(examples), generator=generator).split(BATCH):
            if len(chosen) == BATCH:
                yield examples.take(chosen)

    # -- model ---------------------------------------------------------------------------------------------------------

    def start(self, seed: int) -> nn.Module:
        path = cache_folder() / f"segmentation-fluorescence{'-short' if self.short else ''}.pt"
        epochs = 1 if self.short else 8
        model = unet.pretrained().train()
        source_trained(self, model, path, self._parts["fluorescence training"], epochs=epochs, rate=1e-3)
        return estimate_statistics(model, self.examples(seed)).eval()

    def loss(self, model: nn.Module, batch: Cells) -> Tensor:
        """Cross entropy and one minus the soft Dice."""
        logits = model(batch.images)
        probabilities = logits.sigmoid()
        shared = (probabilities * batch.masks).sum((1, 2))
        dice = (2 * shared + 1) / (probabilities.sum((1, 2)) + batch.masks.sum((1, 2)) + 1)
        return F.binary_cross_entropy_with_logits(logits, batch.masks) + 1 - dice.mean()

    def lora(self, model: nn.Module) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        pointwise = r".*(_expand_conv|_project_conv)|ups\.\d\.conv\d"
        config = LoraConfig(r=8, lora_alpha=16, target_modules=pointwise, modules_to_save=["head"])
        adapted: nn.Module = get_peft_model(model, config)  # type: ignore[arg-type]
        return adapted

    # -- results -------------------------------------------------------------------------------------------------------

    def score(self, model: nn.Module, examples: Cells) -> float:
        return dice(model, examples)

    @property
    def validation(self) -> Cells:
        return self._parts["validation"]

    def scores(self, model: nn.Module) -> dict[str, float]:
        return {"Dice": dice(model, self._parts["test"]), "fluorescence": dice(model, self._parts["fluorescence"])}


def dice(model: nn.Module, examples: Cells) -> float:
    """Twice the shared area over the sum of both, at a probability of a half: the mean over images."""
    training = model.training
    model.eval()
    found = []
    with torch.no_grad():
        for part in torch.arange(len(examples)).split(BATCH):
            batch = examples.take(part)
            said = (model(batch.images) > 0).float()
            shared, both = (said * batch.masks).sum((1, 2)), said.sum((1, 2)) + batch.masks.sum((1, 2))
            found += torch.where(both > 0, 2 * shared / both.clamp(min=1), 1.0).tolist()
    model.train(training)
    return sum(found) / len(found)


def estimate_statistics(model: nn.Module, examples: Cells) -> nn.Module:
    """Every batch norm's statistics anew: the mean over the batches of ``examples``, in one pass without gradients."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch then takes the plain mean
    model.train()
    with torch.no_grad():
        for part in torch.arange(len(examples)).split(BATCH):
            model(examples.take(part).images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, metavar="IMAGES", help="the .npz file of images")
    study.add_options(parser, Segmentation(Path()))
    asked = parser.parse_args(arguments)
    study.run(Segmentation(asked.images), asked)


if __name__ == "__main__":
    main()
