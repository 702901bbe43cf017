"""Options that several commands share, with one wording."""

from __future__ import annotations

from typing import Annotated

import typer

Freeze = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="Take this away from every row; alone: from @all.")
]
Method = Annotated[
    list[str] | None,
    typer.Option(
        metavar="M",
        help="freeze (default), train-only, optimizer-only, backward-inputs or lower-bound. Repeat to compare.",
    ),
]
Optimizer = Annotated[str, typer.Option(help="Any class of torch.optim, in any case.")]
Inputs = Annotated[
    list[str] | None,
    typer.Option("--input", metavar="[NAME=]8x128[:int64]", help="The shape of an input. Repeat for several."),
]
ModelClass = Annotated[
    str | None, typer.Option(help="For a config.json, such as AutoModelForCausalLM; default: its architectures.")
]
Device = Annotated[str | None, typer.Option(help="Where to cost it; default: where the model is.")]
EvalMode = Annotated[bool, typer.Option("--eval", help="Trace in eval mode; default: train mode.")]
Loss = Annotated[str | None, typer.Option(help='"sum" for a model without a loss: figures are assumed.')]
AsJson = Annotated[bool, typer.Option("--json", help="Print data; its schema is reports/schema.json.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
