"""No false alarm: scripts that look like a mistake and are none."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.watching.look_alikes import HEAD, LOOK_ALIKES, TRANSFORMED
from tests.watching.watching import found, plainly, watched, write


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_nothing_is_found_in_what_is_fine(name: str, tmp_path: Path) -> None:
    seen, ended = watched(write(tmp_path, HEAD + LOOK_ALIKES[name]))
    assert (ended.code, found(seen), seen.notes) == (0, [], [])


@pytest.mark.parametrize("name", TRANSFORMED)
def test_what_torch_func_transforms_is_let_alone_and_said(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, HEAD + TRANSFORMED[name])
    plainly(path)
    printed = capsys.readouterr().out
    seen, ended = watched(path)
    assert (ended.code, found(seen)) == (0, [])
    assert seen.notes == ["modules are called inside torch.func transforms: what ran there was not seen"]
    assert capsys.readouterr().out == printed
