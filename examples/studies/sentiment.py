"""Film reviews to electronics: ``python -m examples.studies.sentiment [ROW ...] [--write]``.

MiniLM is fine-tuned on sentences from film reviews, once. Then it is adapted with 300 sentences from reviews of
electronics, by one subset of its parameters after the other; see `examples.studies.study` for what is run and kept.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples import minilm
from examples.studies import study
from examples.studies.sentences import Sentences, rated
from examples.studies.task import Batch, Settings, Task, cache_folder
from examples.studies.training import source_trained

TOKENS = 48
BATCH = 10
SETTINGS = Settings(epochs=4, rates=(1e-4, 3e-4, 1e-3, 3e-3), seeds=(0, 1, 2), points=2)
SHORT = Settings(epochs=1, rates=(2e-4,), seeds=(0,), points=1)


class Sentiment(Task):
    """Is a sentence favourable? The pretrained MiniLM, fine-tuned on sentences of film reviews, is adapted with 300
    sentences of electronics reviews, which each seed draws from some 1,250; 300 others are the validation, 1,400 the
    test. 600 sentences of films show what is forgotten. The label is the sign of the mean of 20 ratings from -4 to 4;
    sentences nearer to 0 than 0.5 are left out. Dropout as MiniLM was trained with."""

    name = "sentiment"
    title = "Sentiment: film reviews to electronics"
    metric = "accuracy"
    higher = "accuracy on held-out electronics"
    last = {f"last {k}": f"@last:{k}" for k in (1, 2, 3)}  # noqa: RUF012
    batch_size = BATCH

    def __init__(self, settings: Settings | None = None, *, short: bool = False) -> None:
        self.settings = settings or (SHORT if short else SETTINGS)
        self.short = short
        self.num_examples = 30 if short else 300

    # -- data ----------------------------------------------------------------------------------------------------------

    @cached_property
    def _parts(self) -> dict[str, Sentences]:
        """Films to start from and to test on; electronics to test and to validate on, and to draw from."""
        films, electronics = _shuffled(rated("films")), _shuffled(rated("electronics"))
        parts = {
            "film test": _cut(films, 0, 600),
            "film training": _cut(films, 600, None),
            "test": _cut(electronics, 0, 1400),
            "validation": _cut(electronics, 1400, 1700),
            "pool": _cut(electronics, 1700, None),
        }
        if self.short:
            parts = {name: _cut(part, 0, 60) for name, part in parts.items()}
        return parts

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(minilm.weights_folder())

    def _tokens(self, texts: list[str], padding: str) -> dict[str, Tensor]:
        encoded = self._tokenizer(texts, padding=padding, truncation=True, max_length=TOKENS, return_tensors="pt")
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}

    def examples(self, seed: int) -> Sentences:
        pool = self._parts["pool"]
        chosen = random.Random(seed).sample(range(len(pool.texts)), self.num_examples)
        return Sentences([pool.texts[i] for i in chosen], [pool.labels[i] for i in chosen])

    def batches(self, examples: Sentences, generator: torch.Generator) -> Iterator[Batch]:
        order = torch.randperm(len(examples.texts), generator=generator).tolist()
        for start in range(0, len(order) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            tokens = self._tokens([examples.texts[i] for i in chosen], "max_length")
            yield {**tokens, "labels": torch.tensor([examples.labels[i] for i in chosen])}

    # -- model ---------------------------------------------------------------------------------------------------------

    def start(self, seed: int) -> nn.Module:
        model, _ = minilm.sentiment()
        path = cache_folder() / f"sentiment-films-by-{BATCH}{'-short' if self.short else ''}.pt"
        return source_trained(self, model, path, self._parts["film training"], epochs=1, rate=1e-4)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return F.cross_entropy(logits, batch["labels"])

    def lora(self, model: nn.Module) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"]
        )
        adapted: nn.Module = get_peft_model(model, config)
        return adapted

    # -- results -------------------------------------------------------------------------------------------------------

    @property
    def validation(self) -> Sentences:
        return self._parts["validation"]

    def score(self, model: nn.Module, examples: Sentences) -> float:
        """Sentences of like length are taken together, so that little is padding."""
        order = sorted(range(len(examples.texts)), key=lambda i: len(examples.texts[i]))
        training = model.training
        model.eval()
        right = 0
        with torch.no_grad():
            for start in range(0, len(order), 50):
                chosen = order[start : start + 50]
                logits = model(**self._tokens([examples.texts[i] for i in chosen], "longest")).logits
                right += int((logits.argmax(1) == torch.tensor([examples.labels[i] for i in chosen])).sum())
        model.train(training)
        return right / len(order)

    def scores(self, model: nn.Module) -> dict[str, float]:
        parts = self._parts
        return {"accuracy": self.score(model, parts["test"]), "films": self.score(model, parts["film test"])}


def _shuffled(sentences: Sentences) -> Sentences:
    order = list(range(len(sentences.texts)))
    random.Random("frostline").shuffle(order)
    return Sentences([sentences.texts[i] for i in order], [sentences.labels[i] for i in order])


def _cut(sentences: Sentences, start: int, end: int | None) -> Sentences:
    return Sentences(sentences.texts[start:end], sentences.labels[start:end])


if __name__ == "__main__":
    study.main(Sentiment(), __doc__)
