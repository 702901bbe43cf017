"""``frostline watch``: run a training script as it is, and say what it wastes and what is silently wrong."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from frostline.cli.terminal import report_width

if TYPE_CHECKING:
    from rich.console import Console

    from frostline.watching.watch import Watch

EXAMPLES = """\b
Examples:
  frostline watch train.py --epochs 3
  frostline watch --steps 20 train.py
  frostline watch --strict --json findings.json train.py
  frostline watch --values --steps 2 train.py
  frostline watch --ignore unowned-grad train.py
  frostline watch -m package.train --lr 0.1
  torchrun --nproc-per-node 2 -m frostline watch train.py
"""

SETTINGS = {"allow_interspersed_args": False, "ignore_unknown_options": False, "help_option_names": ["-h", "--help"]}


def watch(
    command: Annotated[
        list[str],
        typer.Argument(metavar="SCRIPT [ARGS ...]", help="What Python would be given: a file, and its own arguments."),
    ],
    module: Annotated[bool, typer.Option("-m", help="SCRIPT is a module's name, as for python -m.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, metavar="N", help="End it after N optimizer steps.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if anything is WRONG or WASTE.")] = False,
    values: Annotated[
        bool, typer.Option("--values", help="Also show what flows through each module: shapes, values, gradients.")
    ] = False,
    time: Annotated[
        bool, typer.Option("--time", help="After the script, time the ops of its step: findings then have seconds.")
    ] = False,
    as_json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Write the data; its schema is reports/schema.json.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="RULE", help="Leave a rule out. Repeat for several.")
    ] = None,
) -> None:
    """Run a training script as it is, and say what it wastes and what is silently wrong.

    The script's output, exit code and results are its own; the report goes to stderr, after its end. Of several
    processes (torchrun ... -m frostline watch train.py) rank 0 reports.
    """
    from rich.console import Console

    from frostline.watching.ranks import own_rank
    from frostline.watching.script import Enough, Script, flush
    from frostline.watching.watch import Watch

    def stop(done: int) -> None:
        if steps is not None and done >= steps:
            raise Enough

    # The script may go elsewhere, put streams of its own in place and close them: ours are taken first.
    process, console = os.getpid(), Console(file=sys.stderr, highlight=False)
    data = None if as_json is None else Path(as_json).absolute()
    threads = _threads()
    script = Script(command[0], command[1:], module=module)
    seen = Watch(command[0], ignore or (), stop, values=values, time=time)
    with seen:
        ended = script.run(seen.close, stays=True)
    seen.record.ended = ended.how
    if os.getpid() != process or own_rank(seen.record):  # a child of the script's own; rank 0 speaks for all
        raise typer.Exit(ended.code)
    _note_threads(seen, threads)
    flush()
    _report(seen, console, data)
    if ended.code == 0 and strict and not seen.is_clean:
        raise typer.Exit(1)
    raise typer.Exit(ended.code)


def _threads() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


def _note_threads(seen: Watch, before: dict[str, str | None]) -> None:
    """Say that numbers of threads that the script itself set were not taken: they are read when torch is imported."""
    import torch

    now = torch.get_num_threads()
    for name, value in _threads().items():
        if value not in (None, before[name], str(now)):
            seen.record.notes.append(
                f"the script set {name}={value} too late: watch imports torch before the script runs, and torch ran "
                f"with {now} threads; set it in the shell"
            )


def _report(seen: Watch, console: Console, data: Path | None) -> None:
    from frostline.reports.text import show
    from frostline.reports.watching import watch_lines

    if not console.file.closed:
        show(watch_lines(seen, report_width(console)), console)
    if data is not None:
        data.write_text(json.dumps(seen.to_dict(), indent=2) + "\n", encoding="utf-8")
