"""``frostline fit``: the largest batch and sequence length that a memory limit allows."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from frostline.cli.options import AsJson, Debug, Device, EvalMode, Freeze, Inputs, Loss, Method, ModelClass, Optimizer
from frostline.cli.terminal import progress, report_width
from frostline.errors import FrostlineError

DEFAULT_ROW = "@now"

EXAMPLES = """\b
Examples:
  frostline fit examples/gpt2.py:gpt2_small --train @head --train @last:2 --train @all --memory 8GiB
  frostline fit train.py:build --train @last:4 --memory 24GiB --batch-dim images=0 --batch-dim loss.labels=0
  frostline fit meta-llama/config.json --input 1x2048 --train @last:4 --memory 80GiB --method freeze
  frostline fit train.py:build --train "*lora*" --memory 16GiB --scratch --json
"""


def fit(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="file.py:name or package.module:name, a function that returns model, (model, inputs) or (model, "
            "inputs, loss); the path of a Hugging Face config.json (or its folder), built without weights; or a "
            'training script, "train.py ARGS", which is run until its second step.',
        ),
    ],
    memory: Annotated[
        str, typer.Option(metavar="24GiB", help="What may be allocated at the peak: B, KiB, MiB, GiB (or kB, MB, GB).")
    ],
    train: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATTERN[,PATTERN]",
            help="A row: names or globs of parameters or modules, @now @all @head @biases @norms @last:K; a leading ! "
            f"takes away. Repeat for more rows. Without any: {DEFAULT_ROW}.",
        ),
    ] = None,
    freeze: Freeze = None,
    method: Method = None,
    optimizer: Optimizer = "adamw",
    batch_dim: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=0",
            help="The batch dimension of an input (or of loss.NAME, a tensor that the loss brings with it). Repeat for "
            "several. Default: dimension 0 of all that have as many rows as the first input.",
        ),
    ] = None,
    sequence_dim: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=1", help="The same for the sequence length. Default: dimension 1 of (batch, length) integers."
        ),
    ] = None,
    batch_only: Annotated[bool, typer.Option("--batch-only", help="Look for no sequence length.")] = False,
    scratch: Annotated[
        bool,
        typer.Option(
            "--scratch", help="At the sizes found, run each op alone for its scratch memory; then look again."
        ),
    ] = False,
    inputs: Inputs = None,
    model_class: ModelClass = None,
    device: Device = None,
    eval_mode: EvalMode = False,
    loss: Loss = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Find the largest batch and sequence length that fit into a memory, for each subset, without running.

    The step is traced again at other sizes; peaks are predicted.
    """
    from frostline.amounts import parse_bytes
    from frostline.cli.loading import check_loss, check_parts, traced
    from frostline.cli.rows import asked_rows, resolved
    from frostline.fitting.fit import fit_rows
    from frostline.targets import load

    check_loss(loss)
    limit = parse_bytes(memory, "--memory")
    batch, sequence = _dims(batch_dim, "--batch-dim"), _dims(sequence_dim, "--sequence-dim")
    with progress(f"tracing {target}") as advance:
        found = load(target, inputs or (), model_class, loss)
        check_parts(target, found)
        trace = traced(target, found, device, eval_mode)
        rows = train or (() if freeze else (DEFAULT_ROW,))
        subsets, _ = resolved(asked_rows(rows, freeze or ()), trace.model)
        fitted = fit_rows(
            trace,
            found.loss,
            subsets,
            limit,
            batch=batch,
            sequence=False if batch_only else sequence,
            methods=method or "freeze",
            optimizer=optimizer,
            scratch=scratch,
            progress=lambda what: advance(0, 0, what),
        )
    if as_json:
        print(json.dumps(fitted.to_dict(), indent=2))
        return
    from rich.console import Console

    from frostline.reports.fit import fit_lines
    from frostline.reports.text import show

    console = Console(highlight=False)
    show(fit_lines(fitted, report_width(console)), console)


def _dims(texts: list[str] | None, option: str) -> dict[str, list[int]] | None:
    """``NAME=0`` and so on as name -> dimensions; None if there are none."""
    found: dict[str, list[int]] = {}
    for text in texts or ():
        name, equals, dim = text.rpartition("=")
        if not equals or not name or not dim.isdigit():
            raise FrostlineError(f"{option} {text!r} cannot be read: write NAME=0")
        found.setdefault(name, []).append(int(dim))
    return found or None
