"""No false alarm: scripts that look like a mistake and are none."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.watching.look_alikes import HEAD, LOOK_ALIKES
from tests.watching.watching import found, watched, write


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_nothing_is_found_in_what_is_fine(name: str, tmp_path: Path) -> None:
    seen, ended = watched(write(tmp_path, HEAD + LOOK_ALIKES[name]))
    assert (ended.code, found(seen), seen.notes) == (0, [], [])
