"""The block "at the peak", and plots."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.golden.models import Encoder, mean_square

import frostline as fl
from frostline.costing.comparison import sweep_last
from frostline.errors import FrostlineError
from frostline.reports.lines import plain
from frostline.reports.peaks import moment_words, peak_lines
from frostline.reports.plots import check_plot, plot_memory, plot_sweep


def trace_of() -> fl.Trace:
    return fl.trace(Encoder(2, 32), torch.randint(0, 1000, (2, 16)), mean_square)


@pytest.mark.parametrize("width", [80, 100, 120])
def test_kinds_add_up_to_the_peak_and_the_place_is_named(width: int) -> None:
    trace = trace_of()
    rows = [(name, trace.cost(name).peak) for name in ("@head", "@last:1", "@all")]
    text = plain(peak_lines("at the peak", rows, width))
    assert max(map(len, text.splitlines())) <= width
    line = next(line for line in text.splitlines() if line.startswith("@all"))
    *parts, total = [
        float(cell.replace(",", "").replace("<", "")) for cell in line.split()[1:] if cell[0] in "<0123456789"
    ]
    assert abs(sum(parts) - total) <= 0.06 * len(parts)
    assert rows[-1][1].phase in text
    assert rows[-1][1].module in text


def test_the_optimizers_moment_has_no_module() -> None:
    cost = fl.trace(torch.nn.Linear(64, 64), torch.rand(1, 64), mean_square).cost("@all")
    assert cost.peak.phase == "optimizer"
    assert moment_words(cost.peak) == "the optimizer's step"
    assert "(the model)" not in plain(peak_lines("at the peak", [("all", cost.peak)], 120))


# -- plots ------------------------------------------------------------------------------------------------------------

needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is an extra")


@needs_matplotlib
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_memory_over_the_step_is_drawn(tmp_path: Path, suffix: str) -> None:
    trace = trace_of()
    file = tmp_path / f"memory{suffix}"
    plot_memory([(name, trace.cost(name)) for name in ("@head", "@last:1", "@all")], file)
    head = file.read_bytes()[:64]
    assert head.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")


@needs_matplotlib
def test_the_sweep_is_drawn(tmp_path: Path) -> None:
    file = tmp_path / "sweep.svg"
    plot_sweep(sweep_last(trace_of()), file)
    assert file.stat().st_size > 1000


def test_a_plot_that_cannot_be_written_is_an_error_before_anything_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FrostlineError, match=r"\.png or \.svg, not 'memory\.gif'"):
        check_plot("memory.gif")
    with pytest.raises(FrostlineError, match="there is no folder"):
        check_plot(str(tmp_path / "none" / "memory.png"))
    find: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    with pytest.raises(FrostlineError, match=r"pip install 'frostline\[plot\]'"):
        check_plot(str(tmp_path / "memory.png"))


def test_nothing_imports_matplotlib_until_a_plot_is_drawn() -> None:
    code = "import sys, frostline.reports.plots; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
