"""``frostline measure``: run it, and set what was predicted beside what it took."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from frostline.cli.options import AsJson, Debug, Inputs, ModelClass, Optimizer
from frostline.cli.terminal import progress, report_width

DEFAULT_ROW = "@head"

EXAMPLES = """\b
Examples:
  frostline measure examples/small.py:digits_cnn --train fc1,fc2
  frostline measure train.py:build --train @head --train @last:2 --repeats 15
  frostline measure train.py:build --train @biases --method freeze --method backward-inputs --threads 1
  frostline measure bert/config.json --input 8x128 --train @last:4 --optimizer sgd --no-predict
  frostline measure train.py:build --train @head --json
"""


def measure(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="file.py:name or package.module:name, a function that returns model, (model, inputs) or (model, "
            "inputs, loss); the path of a Hugging Face config.json (or its folder), run with random weights; or a "
            'training script, "train.py ARGS", which is run until its second step.',
        ),
    ],
    train: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATTERN[,PATTERN]",
            help="A row: names or globs of parameters or modules, @now @head @biases @norms @last:K; a leading ! takes "
            f"away. Repeat for more rows. Without any: {DEFAULT_ROW}. @all is always there.",
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            metavar="M", help="freeze, optimizer-only, train-only or backward-inputs; default: the first two."
        ),
    ] = None,
    optimizer: Optimizer = "adamw",
    repeats: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Rounds; default: what fits in a minute, 5 to 25.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Of torch's operators; default: torch's own choice.")
    ] = None,
    inputs: Inputs = None,
    model_class: ModelClass = None,
    device: Annotated[str | None, typer.Option(help="Where to run it; default: where the model is.")] = None,
    eval_mode: Annotated[bool, typer.Option("--eval", help="Run in eval mode; default: train mode.")] = False,
    loss: Annotated[str | None, typer.Option(help='"sum" for a model without a loss.')] = None,
    no_predict: Annotated[
        bool, typer.Option("--no-predict", help="Time no probes: only bytes and FLOPs are predicted.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run training steps of a subset and of the whole model, beside what was predicted for them.

    Every row runs in a process of its own, turn by turn; full training (@all) runs in two, for the machine's noise.
    """
    from frostline.cli.loading import check_loss, check_parts, traced
    from frostline.cli.rows import asked_rows, resolved
    from frostline.measuring.case import Source
    from frostline.measuring.measure import measure_rows
    from frostline.targets import load

    check_loss(loss)
    with progress(f"tracing {target}") as advance:
        found = load(target, inputs or (), model_class, loss)
        check_parts(target, found)
        trace = traced(target, found, device, eval_mode)
        subsets, _ = resolved(asked_rows(train or (DEFAULT_ROW,), ()), trace.model)
        measurement = measure_rows(
            Source(
                target,
                tuple(inputs or ()),
                model_class,
                loss,
                eval_mode=eval_mode or (None if found.as_found else False),
                device=device,
            ),
            trace,
            subsets,
            method or None,
            optimizer=optimizer,
            repeats=repeats,
            threads=threads,
            predict=not no_predict,
            progress=lambda what, done, total: advance(done, total, what),
        )
    if debug:
        print("".join(row.detail for row in measurement), end="", file=sys.stderr)
    if as_json:
        print(json.dumps(measurement.to_dict(), indent=2))
        return
    from rich.console import Console

    from frostline.reports.measurement import measurement_lines
    from frostline.reports.text import show

    console = Console(highlight=False)
    show(measurement_lines(measurement, report_width(console)), console)
