"""``frostline plan``: the subset that is worth most of those that a budget allows."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from frostline.cli.options import AsJson, Debug, Device, EvalMode, Inputs, Loss, ModelClass, Optimizer
from frostline.cli.terminal import clean_stdout, progress, report_width, saying
from frostline.errors import PlanError

if TYPE_CHECKING:
    from frostline.tracing.trace import Trace

EXAMPLES = """\b
Examples:
  frostline plan examples/minilm.py:sentiment --importance size --budget step_flops=50%
  frostline plan train.py:build --importance gradient_norm --budget step_seconds=50% --budget peak_bytes=4GiB
  frostline plan train.py:build --importance scores.json --budget saved_bytes=200MiB --method train-only --by layer
  frostline plan examples/llama.py:llama_3_8b --importance size --budget step_flops=60% --save plan.json
  frostline plan train.py:build --importance scores.json --frontier step_seconds --plot frontier.svg
  frostline cost train.py:build --train plan.json
"""


class By(StrEnum):
    """What trains together."""

    tensor = "tensor"
    layer = "layer"


class PlanMethod(StrEnum):
    """What a plan may be for."""

    freeze = "freeze"
    train_only = "train-only"


def plan(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="file.py:name or package.module:name, a function that returns model, (model, inputs) or (model, "
            "inputs, loss); or the path of a Hugging Face config.json (or its folder), built without weights.",
        ),
    ],
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIGURE=AMOUNT",
            help="What a step may take at most: step_seconds, step_flops, backward_flops, peak_bytes, saved_bytes, "
            "optimizer_bytes or trainable_parameters, as 50% of training everything or as an amount (4GiB, 2TFLOP, "
            "50ms). Repeat for several.",
        ),
    ] = None,
    importance: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.json|MEASURE",
            help="What training each parameter is worth: a file of parameter name -> number, or taylor, gradient_norm, "
            "gradient_l1, relative_gradient_norm (one backward on what TARGET gives), or size.",
        ),
    ] = None,
    always: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="What trains in any case. Repeat for more.")
    ] = None,
    never: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="What does not train. Repeat for more.")
    ] = None,
    method: Annotated[PlanMethod, typer.Option(help="How the subset is to be trained.")] = PlanMethod.freeze,
    by: Annotated[By, typer.Option(help="Choose among tensors, or among whole layers.")] = By.tensor,
    optimizer: Optimizer = "adamw",
    frontier: Annotated[
        str | None,
        typer.Option(metavar="FIGURE", help="Plan for growing budgets of this figure, and name the knee."),
    ] = None,
    points: Annotated[int, typer.Option(min=2, help="How many budgets --frontier takes.")] = 12,
    plot: Annotated[str | None, typer.Option(metavar="FILE.png|.svg", help="Draw the frontier.")] = None,
    save: Annotated[
        str | None, typer.Option(metavar="FILE.json", help="Write the plan, which --train and fl.Plan.load read.")
    ] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds for the search, of each point.")] = 10.0,
    inputs: Inputs = None,
    model_class: ModelClass = None,
    device: Device = None,
    eval_mode: EvalMode = False,
    loss: Loss = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Find the subset whose importance is largest within a budget, and prove how close to the best it is.

    What it takes is exact, as frostline cost has it.
    """
    from frostline.cli.importances import read_importance
    from frostline.cli.loading import check_loss, traced
    from frostline.targets import load

    check_loss(loss)
    budgets = _budgets(budget)
    _check(budgets, frontier, plot, save)
    measure = read_importance(importance)
    with saying(f"tracing {target}"):
        found = load(target, inputs or (), model_class, loss)
        trace = traced(target, found, device, eval_mode)
    worth = measure(trace)
    if "step_seconds" in (*budgets, frontier):
        with progress("timing ops") as advance:
            trace.calibrate(None, optimizer, advance)
    asked: dict[str, Any] = {
        "always": always, "never": never, "method": method.value, "by": by.value, "optimizer": optimizer,
        "time_limit": time_limit,
    }  # fmt: skip
    if frontier is None:
        _plan(trace, budgets, worth, asked, save, as_json)
    else:
        _frontier(trace, frontier, points, budgets, worth, asked, plot, as_json)


def _budgets(texts: list[str] | None) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts or ():
        figure, equals, amount = text.partition("=")
        if not equals or not figure.strip() or not amount.strip():
            raise PlanError(f"--budget {text!r} cannot be read: write FIGURE=AMOUNT, such as step_flops=50%")
        if figure.strip() in found:
            raise PlanError(f"--budget {figure.strip()} is given twice: give it once")
        found[figure.strip()] = amount.strip()
    return found


def _check(budgets: dict[str, str], frontier: str | None, plot: str | None, save: str | None) -> None:
    """Say what is wrong before anything is traced."""
    from frostline.planning.budgets import check_figure
    from frostline.reports.plots import check_plot

    for figure in (*budgets, *([frontier] if frontier else [])):
        check_figure(figure)
    if not budgets and frontier is None:
        raise PlanError("give a --budget FIGURE=AMOUNT, such as step_flops=50%, or --frontier FIGURE")
    if plot is not None:
        if frontier is None:
            raise PlanError("--plot draws a frontier: give --frontier FIGURE")
        check_plot(plot)
    if save is not None and frontier is not None:
        raise PlanError("--save writes one plan: give a --budget without --frontier")


def _plan(
    trace: Trace, budgets: dict[str, str], worth: Any, asked: dict[str, Any], save: str | None, as_json: bool
) -> None:
    from frostline.planning.plan import plan as make_plan
    from frostline.reports.plan import plan_lines
    from frostline.reports.text import show

    with saying("planning"), clean_stdout():
        made = make_plan(trace, budgets, worth, **asked)
    if save is not None:
        made.save(save)
    if as_json:
        print(json.dumps(made.to_dict(), indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False)
    show(plan_lines(made, report_width(console), trace), console)


def _frontier(
    trace: Trace, over: str, points: int, budgets: dict[str, str], worth: Any, asked: dict[str, Any], plot: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    from frostline.planning.frontier import frontier as make_frontier
    from frostline.reports.plan import frontier_lines
    from frostline.reports.text import show

    with saying("planning"), clean_stdout():
        made = make_frontier(trace, over, worth, points=points, budget=budgets or None, **asked)
    if plot is not None:
        made.plot(plot)
    if as_json:
        print(json.dumps(made.to_dict(), indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False)
    show(frontier_lines(made, report_width(console)), console)
