"""Rated sentences from reviews of films and of electronics, fetched when they are first wanted.

They come with vaderSentiment's source distribution (Hutto and Gilbert, "VADER: a parsimonious rule-based model for
sentiment analysis of social media text", ICWSM 2014; MIT licence): each with the mean of 20 people's ratings from -4
to 4.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from examples.studies.task import cache_folder

RELEASE = "vaderSentiment==3.3.2"
FILE = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INSIDE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
PARTS = {"films": "movieReviewSnippets", "electronics": "amazonReviewSnippets"}
LEAST_RATING = 0.5  # nearer to 0 the raters were undecided, and there is no right answer


@dataclass(frozen=True)
class Sentences:
    """Texts and whether each is favourable."""

    texts: list[str]
    labels: list[int]


class NotFetchedError(Exception):
    """The sentences are not here and could not be fetched."""


def rated(part: str) -> Sentences:
    """The sentences of ``"films"`` or ``"electronics"`` that were rated as favourable or as unfavourable.

    Raises:
        NotFetchedError: they are not here and could not be fetched.
    """
    texts, labels = [], []
    for line in _read(PARTS[part]).splitlines():
        _, rating, text = line.split("\t")
        if abs(float(rating)) >= LEAST_RATING:
            texts.append(text)
            labels.append(int(float(rating) > 0))
    return Sentences(texts, labels)


def _read(name: str) -> str:
    with tarfile.open(_archive()) as outer:
        held = outer.extractfile(INSIDE)
        assert held is not None
        with tarfile.open(fileobj=io.BytesIO(held.read())) as inner:
            file = inner.extractfile(f"hutto_ICWSM_2014/{name}_GroundTruth.txt")
            assert file is not None
            return file.read().decode("utf-8")


def _archive() -> Path:
    """The source distribution, fetched by pip if it is not here."""
    path = cache_folder() / FILE
    if not path.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-binary", ":all:", "--no-deps", RELEASE]
        done = subprocess.run([*command, "-d", str(path.parent)], capture_output=True, text=True, check=False)
        if done.returncode or not path.exists():
            raise NotFetchedError(f"{RELEASE} could not be fetched by pip: {done.stderr.strip()[-500:]}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise NotFetchedError(
            f"{path} is not the file it should be (sha256 {found}): remove it, and it is fetched again"
        )
    return path
