"""Reports as text and HTML: what they say, and that they fit."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import frostline as fl
from frostline.costing.comparison import Comparison
from frostline.reports.findings import findings, reach
from frostline.reports.header import header
from frostline.reports.text import comparison_text, marginal_text


def trace_of(model: nn.Module | None = None) -> fl.Trace:
    model = model or nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    return fl.trace(model, torch.randn(8, 16), loss=lambda out: out.sum())


class Attention(nn.Module):
    """Attention by torch's own function, with or without dropout, or written out."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.reshape(2, 2, 4, 8) for part in self.qkv(x).chunk(3, -1))
        if self.how == "written out":
            return (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1 if self.how == "math" else 0.0)


def test_a_cost_prints_as_one_honest_line() -> None:
    assert str(trace_of().cost("2")) == (
        "trainable 20 % of parameters | 55 % of a full step's FLOPs | 67 % of its saved bytes | "
        "20 % of its gradients and optimizer state | exact | 41 % of its peak memory | predicted"
    )


@pytest.mark.parametrize("width", [80, 100, 120])
def test_no_line_is_wider_than_asked(width: int) -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.LayerNorm(16)) for _ in range(12)))
    trace = trace_of(model)
    rows = trace.compare({name: name for name in ("@head", "@last:2", "@biases", "@norms", "@all")})
    texts = [comparison_text(rows, width), marginal_text(trace.marginal("@norms"), width)]
    for line in "\n".join(texts).splitlines():
        assert len(line) <= width, line


def test_a_table_holds_what_the_shares_are_of() -> None:
    text = str(trace_of().compare({"head": "2"}))
    assert re.search(r"^\(everything\) +100 ", text, re.MULTILINE)
    assert "(everything)" not in str(trace_of().compare({"head": "2", "all": "@all"}))


def test_shares_in_the_table_are_those_of_the_figures() -> None:
    cost = trace_of().cost("2")
    text = comparison_text(trace_of().compare({"head": "2"}), 120)
    line = next(line for line in text.splitlines() if re.match(r"head +\d", line))
    assert f"{100 * cost.peak_bytes / cost.full.peak_bytes:.1f}" in line
    assert f"{100 * cost.step_flops / cost.full.step_flops:.1f}" in line
    assert f"{100 * cost.saved_bytes / cost.full.saved_bytes:.1f}" in line


def test_backward_reaches_the_first_parameter_used() -> None:
    trace = trace_of()
    assert reach(trace.cost("2")) == "2.weight"
    assert reach(trace.cost("@biases")) == "0.bias"
    assert reach(trace.cost("2", method="optimizer-only")) == "0.weight"


def kinds(comparison: Comparison) -> list[str]:
    return [finding.kind for finding in findings(comparison.rows)]


def text_of(comparison: Comparison, kind: str) -> str:
    (text,) = [finding.text for finding in findings(comparison.rows) if finding.kind == kind]
    return text


def test_optimizer_only_waste_is_told_with_figures_and_what_to_do() -> None:
    text = text_of(trace_of().compare({"head": "2"}), "waste")
    assert "1.8 x the FLOPs" in text
    assert "2.12 KiB of gradients that nothing uses" in text
    assert "requires_grad_(False)" in text


def test_nothing_is_wasted_when_everything_trains() -> None:
    assert "waste" not in kinds(trace_of().compare({"all": "@all"}))


def test_parameters_without_a_gradient_are_named() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(16, 4), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    text = text_of(trace_of(Unused()).compare({"all": "@all"}), "unreached")
    assert "does not reach idle" in text


def test_a_slice_says_what_it_alone_needs() -> None:
    text = text_of(trace_of().compare({"half": "0.weight[:, :8]"}), "slice")
    assert "512 numbers for 256" in text
    assert "1.00 KiB of gradients" in text


def test_an_op_without_a_formula_is_named_beside_the_total() -> None:
    class Solves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(self.inner(x).detach()) + torch.linalg.matrix_exp(self.inner.weight).sum()

    comparison = trace_of(Solves()).compare({"all": "@all"})
    assert comparison["all"].uncounted
    assert "FLOPs are in no total" in text_of(comparison, "uncounted")


def test_what_is_assumed_is_said_below_the_table() -> None:
    trace = fl.trace(nn.Linear(4, 4), torch.randn(2, 4), loss="sum")
    text = str(trace.compare({"all": "@all"}))
    assert "assumed: the loss is the sum of the outputs" in text
    assert re.search(r"^basis +assumed", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("how", "kernel"), [("written out", "written out (matmul, softmax)"), ("math", "math"), ("fused", "flash (cpu)")]
)
def test_the_header_names_the_attention_kernel(how: str, kernel: str) -> None:
    trace = fl.trace(Attention(how), torch.randn(2, 4, 16), loss=lambda out: out.sum())
    assert header(trace).attention == kernel


def test_the_header_says_when_modes_are_mixed() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))
    model[1].eval()
    assert header(trace_of(model)).modes == "mixed modes: train, but 1 of 3 modules in eval (1)"
    assert header(trace_of(model.eval())).modes == "eval mode"


def tags(html: str) -> Iterator[str]:
    return iter(re.findall(r"</?(\w+)", html))


def test_html_says_the_same_and_closes_its_tags() -> None:
    trace = trace_of()
    for html in (trace.cost("2")._repr_html_(), trace.compare("2")._repr_html_(), trace.marginal("2")._repr_html_()):
        opened = re.findall(r"<(\w+)", html.replace("<br>", ""))
        closed = re.findall(r"</(\w+)", html)
        assert sorted(opened) == sorted(closed)
    html = trace.compare({"a<b": "2"})._repr_html_()
    assert "a&lt;b" in html
    assert "the forward alone is" in html
