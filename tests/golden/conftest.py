"""``pytest tests/golden --update-golden`` writes the reports anew (the option is in tests/conftest.py)."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def golden(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    """``golden(name, text)`` asserts that the report is what ``tests/golden/name.txt`` holds."""

    def compare(name: str, text: str) -> None:
        path = Path(__file__).parent / f"{name}.txt"
        text = text.rstrip() + "\n"
        if request.config.getoption("--update-golden"):
            path.write_text(text, encoding="utf-8")
        assert path.exists(), f"no {path.name}: run pytest tests/golden --update-golden, and read it"
        assert text == path.read_text(encoding="utf-8")

    return compare
