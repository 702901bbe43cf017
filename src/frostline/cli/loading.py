"""TARGET -> Trace, as every command does it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from frostline.errors import FrostlineError, TargetError, TraceError

if TYPE_CHECKING:
    from frostline.targets import Target
    from frostline.tracing.trace import Trace


def check_loss(loss: str | None) -> None:
    """Refuse a ``--loss`` that is not known."""
    if loss not in (None, "sum"):
        raise FrostlineError(f'--loss {loss!r} is not known; there is "sum". Or let the TARGET return its loss.')


def check_parts(spec: str, target: Target) -> None:
    """Refuse a target whose step cannot be taken apart into a model, its inputs and its loss."""
    if target.step is not None:
        raise TargetError(
            f"the step of {spec} is more than one call of one model (or runs under autocast): frostline cost takes it "
            "as a whole; for this command, name a function that returns (model, inputs, loss)"
        )


def traced(spec: str, target: Target, device: str | None, eval_mode: bool) -> Trace:
    """Trace what a TARGET gave; where a loss is missing, say what the command line has for that."""
    import frostline
    from frostline.targets import is_config

    if eval_mode or not target.as_found:
        target.model.train(not eval_mode)
    if target.step is not None:
        return frostline.trace(target.model, step=target.step, device=device)
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
