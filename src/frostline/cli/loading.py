"""TARGET -> Trace, as every command does it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from frostline.errors import FrostlineError, TraceError

if TYPE_CHECKING:
    from frostline.targets import Target
    from frostline.tracing.trace import Trace


def check_loss(loss: str | None) -> None:
    """Refuse a ``--loss`` that is not known."""
    if loss not in (None, "sum"):
        raise FrostlineError(f'--loss {loss!r} is not known; there is "sum". Or let the TARGET return its loss.')


def traced(spec: str, target: Target, device: str | None, eval_mode: bool) -> Trace:
    """Trace what a TARGET gave; where a loss is missing, say what the command line has for that."""
    import frostline
    from frostline.targets import is_config

    target.model.train(not eval_mode)
    try:
        return frostline.trace(target.model, target.inputs, target.loss, device)
    except TraceError as error:
        if "loss=" in str(error):
            heads = (
                "--model-class AutoModelFor..., "
                if is_config(spec)
                else "let the TARGET return (model, inputs, loss), "
            )
            error.add_note(f"on the command line: {heads}or --loss sum")
        raise
