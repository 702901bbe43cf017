"""``fl.plan``: what it accepts, what it refuses in one sentence, and what a plan is good for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import torch
from tests.cases import CASES
from tests.golden.models import Encoder, mean_square
from tests.planning.brute_force import best_within, every_subset
from torch import Tensor, nn

import frostline as fl
from frostline.planning import program
from frostline.reports.data import schema

NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def traced(model: nn.Module | None = None) -> fl.Trace:
    return fl.trace(model or mlp(), torch.randn(4, 8), loss=mean_square)


def worth(trace: fl.Trace, **scores: float) -> dict[str, float]:
    return dict.fromkeys(trace.parameters, 1.0) | {name.replace("_", "."): value for name, value in scores.items()}


@pytest.fixture(scope="module")
def encoder() -> fl.Trace:
    torch.manual_seed(0)
    return fl.trace(Encoder(3, 32), torch.randint(0, 1000, (2, 16)), mean_square)


# -- budgets ----------------------------------------------------------------------------------------------------------


def test_a_share_is_of_training_everything_by_freeze(encoder: fl.Trace) -> None:
    full = encoder.cost("@all")
    for method in ("freeze", "train-only"):
        plan = fl.plan(encoder, {"saved_bytes": "40%"}, worth(encoder), method=method)
        assert plan.budget == {"saved_bytes": full.saved_bytes * 40 // 100}
        assert plan.cost.method == method
        assert plan.cost.saved_bytes <= plan.budget["saved_bytes"]


def test_all_of_it_buys_everything(encoder: fl.Trace) -> None:
    figures = ["step_flops", "backward_flops", "saved_bytes", "optimizer_bytes", "trainable_parameters", "peak_bytes"]
    plan = fl.plan(encoder, dict.fromkeys(figures, "100%"), worth(encoder))
    assert set(plan.subset.names) == set(encoder.parameters)
    assert (plan.gap, plan.objective, plan.total) == (0, len(encoder.parameters), len(encoder.parameters))


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, r"the budget is empty: give one or more of step_seconds, step_flops"),
        ("50%", r"budget must be a mapping such as \{'step_flops': '50%'\}, got str"),
        ({"flops": 5}, r"no budget is called 'flops': "),
        ({"step_flop": "50%"}, r"no budget is called 'step_flop': did you mean 'step_flops'\?"),
        ({"step_flops": "4 GiB"}, r"budget step_flops '4 GiB' cannot be read: write a number and FLOP"),
        ({"peak_bytes": "4G"}, r"budget peak_bytes '4G' cannot be read: .* Did you mean 4GiB\?"),
        ({"trainable_parameters": "many"}, r"budget trainable_parameters 'many' cannot be read"),
        ({"step_flops": 0}, r"budget step_flops must be a number above 0, got 0"),
        ({"step_flops": -3.0}, r"budget step_flops must be a number above 0"),
        ({"step_flops": math.nan}, r"budget step_flops must be a number above 0"),
        ({"step_flops": "0%"}, r"budget step_flops must be a number above 0"),
        ({"step_flops": None}, r"budget step_flops must be a number or a text such as '50%', got None"),
        ({"step_seconds": "50%"}, r"not known yet: call trace.calibrate\(\) first"),
    ],
)
def test_a_budget_that_cannot_be_read(budget: Any, message: str) -> None:
    trace = traced()
    with pytest.raises(fl.FrostlineError, match=message):
        fl.plan(trace, budget, worth(trace))


def test_a_budget_that_nothing_meets_says_the_least_and_what_it_buys() -> None:
    trace = traced()
    least = trace.cost("2.bias").step_flops  # the forward alone: 2 * 4 * (8 * 8 + 8 * 2) = 640
    assert least == 640
    with pytest.raises(fl.FrostlineError) as caught:
        fl.plan(trace, {"step_flops": least - 1}, worth(trace))
    assert str(caught.value) == (
        "no subset meets the budget: step_flops 639 FLOP is below the least possible, 640 FLOP, which buys 2.bias "
        "(25 % of the importance): give at least that"
    )
    assert fl.plan(trace, {"step_flops": least}, worth(trace)).subset.names == ("2.bias",)


def test_of_two_budgets_that_exclude_each_other_one_is_named() -> None:
    trace = traced(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 2, bias=False)))
    few, near = trace.cost("0.bias"), trace.cost("2.weight")
    assert few.num_trained < near.num_trained
    assert few.step_flops > near.step_flops
    budget = {"trainable_parameters": few.num_trained, "step_flops": near.step_flops}
    said = r"within the rest of the budget, trainable_parameters 8 is below the least possible, 16, which buys 2.weight"
    with pytest.raises(fl.FrostlineError, match=said):
        fl.plan(trace, budget, worth(trace))


def test_an_always_that_breaks_the_budget_by_itself() -> None:
    trace = traced()
    with pytest.raises(
        fl.FrostlineError, match=r"always= \(0\) takes .* of step_flops by itself, over the budget of 60%"
    ):
        fl.plan(trace, {"step_flops": "60%"}, worth(trace), always="0")


def test_a_share_of_nothing_is_refused_as_that() -> None:
    trace = traced()
    with pytest.raises(fl.FrostlineError, match=r"'50%', of what training everything takes, which is 0: leave it out"):
        fl.plan(trace, {"optimizer_bytes": "50%"}, worth(trace), optimizer="sgd")


def test_a_budget_below_one_is_told_as_it_was_given() -> None:
    trace = traced()
    with pytest.raises(fl.FrostlineError, match=r"trainable_parameters 0\.5 is below the least possible, 2"):
        fl.plan(trace, {"trainable_parameters": 0.5}, worth(trace))


# -- importance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.bias": -1.0}, r"negative or no finite number for 0.bias \(-1.0\)"),
        ({"0.bias": math.nan, "2.bias": math.inf}, r"no finite number for 0.bias \(nan\), 2.bias \(inf\)"),
        ({"0.bias": "much"}, r"the importance of '0.bias' is 'much': give it a number"),
        ({"3.bias": 1.0}, r"importance names 3.bias, which is no parameter of this Sequential"),
        ({"0.bias": None}, r"the importance of '0.bias' is None"),
    ],
)
def test_importance_that_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    trace = traced()
    with pytest.raises(fl.FrostlineError, match=message):
        fl.plan(trace, {"step_flops": "50%"}, {**worth(trace), **change})


def test_two_numbers_for_one_tied_parameter_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    trace = traced(model)
    assert fl.plan(trace, {"step_flops": "100%"}, {**worth(trace), "1.weight": 1.0}).objective == 3
    with pytest.raises(fl.FrostlineError, match=r"'0.weight' and '1.weight' different numbers, 1.0 and 2.0"):
        fl.plan(trace, {"step_flops": "50%"}, {**worth(trace), "1.weight": 2.0})


def test_importance_that_is_missing_is_named_unless_it_never_trains() -> None:
    trace = traced()
    scores = {name: 1.0 for name in NAMES if name != "0.weight"}
    with pytest.raises(fl.FrostlineError, match=r"no entry for 0.weight \(1 of 4 parameters\)"):
        fl.plan(trace, {"step_flops": "90%"}, scores)
    plan = fl.plan(trace, {"step_flops": "90%"}, scores, never="0.weight")
    assert plan.subset.names == ("0.bias", "2.weight", "2.bias")
    with pytest.raises(fl.FrostlineError, match="importance must be a mapping"):
        fl.plan(trace, {"step_flops": "90%"}, [1.0, 2.0])


def test_importance_may_be_an_object_with_scores_and_tensors_of_one_number() -> None:
    trace = traced()
    scores = {name: torch.tensor(2.0) for name in NAMES}
    plan = fl.plan(trace, {"step_flops": "100%"}, SimpleNamespace(scores=scores, measure="taylor"))
    assert plan.objective == 8
    assert plan.importance_source == "taylor"
    assert "importance: taylor" in str(plan)


def test_what_gets_no_gradient_is_no_importance_won() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.late, self.unused = nn.Linear(8, 8), nn.Linear(8, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.late(self.early(x).detach())

    trace = traced(Cut())
    scores = {name: 1.0 if name.startswith("late") else 100.0 for name in trace.parameters}
    plan = fl.plan(trace, {"step_flops": "100%"}, scores)
    assert plan.subset.names == ("late.weight", "late.bias")
    assert (plan.objective, plan.total) == (2, 2)
    with pytest.raises(
        fl.FrostlineError, match=r"always= names early.weight, early.bias, which the loss does not reach"
    ):
        fl.plan(trace, {"step_flops": "100%"}, scores, always="early")


def test_what_is_worth_nothing_is_left_out() -> None:
    trace = traced()
    plan = fl.plan(trace, {"step_flops": "100%"}, {**worth(trace), "0.weight": 0.0, "2.bias": 0.0})
    assert plan.subset.names == ("0.bias", "2.weight")


# -- always, never, layers --------------------------------------------------------------------------------------------


def test_always_and_never() -> None:
    trace = traced()
    plan = fl.plan(trace, {"step_flops": "100%"}, worth(trace), always="0.bias", never=["2.weight", "2.bias"])
    assert plan.subset.names == ("0.weight", "0.bias")
    assert (plan.always, plan.never) == (("0.bias",), ("2.weight", "2.bias"))
    with pytest.raises(fl.FrostlineError, match=r"0.bias is in always and in never"):
        fl.plan(trace, {"step_flops": "100%"}, worth(trace), always="0.bias", never="0")
    with pytest.raises(fl.FrostlineError, match="never takes away every parameter"):
        fl.plan(trace, {"step_flops": "100%"}, worth(trace), never="@all")
    with pytest.raises(fl.FrostlineError, match=r"always= names a slice"):
        fl.plan(trace, {"step_flops": "100%"}, worth(trace), always="0.weight[:4]")
    with pytest.raises(fl.FrostlineError, match=r"by must be 'tensor' or 'layer', got 'block'"):
        fl.plan(trace, {"step_flops": "100%"}, worth(trace), by="block")
    with pytest.raises(fl.FrostlineError, match=r"plans are for method freeze or train-only, not 'optimizer-only'"):
        fl.plan(trace, {"step_flops": "100%"}, worth(trace), method="optimizer-only")


@pytest.mark.parametrize("share", ["45%", "60%", "80%"])
def test_layers_train_as_a_whole_or_not_at_all_and_no_choice_of_them_is_worth_more(
    encoder: fl.Trace, share: str
) -> None:
    scores = {name: float(number % 7) for number, name in enumerate(encoder.parameters)}
    plan = fl.plan(encoder, {"step_flops": share}, scores, by="layer")
    layers = ["embed", "embed_norm", "blocks.0", "blocks.1", "blocks.2", "head"]
    groups = [[n for n in encoder.parameters if n.startswith(layer + ".")] for layer in layers]
    for group in groups:
        assert {name in plan.subset for name in group} in ({True}, {False})
    best = best_within(every_subset(encoder, scores, figures=["step_flops"], groups=groups), plan.budget)
    assert best is not None
    assert plan.objective == pytest.approx(best.worth)
    assert plan.gap == 0


# -- time, and steps that cannot be taken apart -----------------------------------------------------------------------


def test_when_time_runs_out_the_best_so_far_comes_with_its_honest_gap(
    encoder: fl.Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HiGHS finds nothing, and proves a tenth more than there is: what is filled in by hand comes with that gap."""
    real = program.milp

    def out_of_time(*arguments: Any, **named: Any) -> Any:
        found = real(*arguments, **named)
        found.x, found.status, found.mip_dual_bound = None, 1, 1.1 * found.mip_dual_bound
        return found

    scores = {name: float(number % 7) for number, name in enumerate(encoder.parameters)}
    best = fl.plan(encoder, {"step_flops": "60%"}, scores)
    monkeypatch.setattr(program, "milp", out_of_time)
    plan = fl.plan(encoder, {"step_flops": "60%"}, scores, time_limit=1)
    assert plan.cost.step_flops <= plan.budget["step_flops"]
    assert plan.bound == pytest.approx(1.1 * best.objective)
    assert 0 < plan.objective <= best.objective
    assert plan.gap == pytest.approx((1.1 * best.objective - plan.objective) / plan.objective)
    assert f"no subset within the budget has more than {plan.bound:.4g}" in " ".join(str(plan).split())
    assert "the time limit was reached" in " ".join(str(plan).split())
    # However little fits, and whatever little time there is, it is found.
    head = encoder.cost("head.bias").step_flops
    assert fl.plan(encoder, {"step_flops": head}, scores, time_limit=1e-6).subset.names == ("head.bias",)
    with pytest.raises(fl.FrostlineError, match="time_limit must be a number of seconds above 0"):
        fl.plan(encoder, {"step_flops": "60%"}, scores, time_limit=0)


def entangled() -> fl.Trace:
    """A module with a full backward hook: what runs depends on the flags, and every subset is a run of the step."""
    case = CASES["hooks"]()
    trace = fl.trace(case.model, case.inputs, case.loss)
    assert trace.entangled
    assert len(trace.parameters) == 4
    return trace


def test_a_step_that_cannot_be_taken_apart_is_tried_subset_by_subset() -> None:
    trace = entangled()
    scores = {name: 1.0 + number for number, name in enumerate(trace.parameters)}
    plan = fl.plan(trace, {"step_flops": "75%"}, scores, time_limit=60)
    best = best_within(every_subset(trace, scores, figures=["step_flops"]), plan.budget)
    assert best is not None
    assert (plan.objective, plan.gap) == (best.worth, 0)
    assert "a run of the whole step" in " ".join(plan.notes)
    with pytest.raises(fl.FrostlineError, match="of 16 subsets, none of them; raise the budget"):
        fl.plan(trace, {"trainable_parameters": 1}, scores, time_limit=60)


def test_too_many_of_them_are_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = entangled()
    monkeypatch.setattr("frostline.planning.plan.MOST_RUNS", 4)
    with pytest.raises(fl.FrostlineError, match=r"too many for 4 tensors: leave at most 2 .* or compare a few subsets"):
        fl.plan(trace, {"step_flops": "75%"}, worth(trace))


def test_a_sparse_gradient_that_the_optimizer_refuses_is_not_planned_for() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(20, 8, sparse=True), nn.Linear(8, 2)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embed(tokens))

    trace = fl.trace(Tokens(), torch.arange(4), mean_square)
    assert trace.cost("embed").optimizer_bytes is None
    plan = fl.plan(trace, {"optimizer_bytes": "10 MiB"}, worth(trace))
    assert plan.subset.names == ("head.weight", "head.bias")
    assert "refuses the sparse gradients of embed.weight" in " ".join(plan.notes)
    with pytest.raises(fl.FrostlineError, match="take it out of always=, or choose another optimizer"):
        fl.plan(trace, {"optimizer_bytes": "10 MiB"}, worth(trace), always="embed")


# -- what a plan is good for ------------------------------------------------------------------------------------------


def test_a_plan_is_accepted_where_a_subset_is(tmp_path: Path) -> None:
    trace = traced()
    made = fl.plan(trace, {"step_flops": "80%"}, worth(trace))
    made.save(tmp_path / "plan.json")
    for plan in (made, fl.Plan.load(tmp_path / "plan.json")):
        assert trace.cost(plan).step_flops == made.cost.step_flops
        assert trace.cost(train=[plan, "0.weight"]).subset.names == tuple(NAMES)
        assert trace.compare(plan)["freeze"].step_flops == made.cost.step_flops
        assert trace.compare({"plan": plan, "all": "*"})["plan"].subset.names == made.subset.names
        assert trace.marginal(plan).cost.subset.names == made.subset.names
        with fl.train_only(trace.model, plan) as run:
            assert run.subset.names == made.subset.names
            assert [n for n, p in trace.model.named_parameters() if p.requires_grad] == list(made.subset.names)
        fitted = fl.fit(trace.model, torch.randn(4, 8), mean_square, train=plan, memory="1MiB")
        assert next(iter(fitted)).subset.names == made.subset.names


def test_saved_and_loaded_it_says_the_same(tmp_path: Path) -> None:
    trace = traced()
    plan = fl.plan(trace, {"step_flops": "80%", "peak_bytes": "1 MiB"}, worth(trace), always="2.bias", never="0.weight")
    plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    jsonschema.Draft202012Validator(schema()).validate(data)
    assert data["budgets"][0]["spent"] == plan.cost.step_flops
    assert data["versions"]["torch"] == torch.__version__.split("+")[0]
    again = fl.Plan.load(tmp_path / "plan.json")
    assert again.to_dict() == plan.to_dict()
    assert again.cost.step_flops == plan.cost.step_flops
    assert again.subset == plan.subset
    with pytest.raises(
        AttributeError, match=r"a saved cost has no 'by_op': cost the plan again with trace.cost\(plan\)"
    ):
        again.cost.by_op()
    told, retold = (" ".join(str(p).split()) for p in (plan, again))
    assert retold == told.replace(f"- backward reaches {plan.subset.names[0]}. ", "")


def test_another_model_is_refused_with_the_names_that_differ(tmp_path: Path) -> None:
    plan = fl.plan(traced(), {"step_flops": "60%"}, dict.fromkeys(NAMES, 1.0))
    assert plan.subset.names == ("2.weight", "2.bias")
    wider = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 2), nn.Linear(2, 3))
    with pytest.raises(
        fl.FrostlineError, match=r"another model than this one: it lacks 0.bias; it has besides 3.weight"
    ):
        traced(wider).cost(plan)
    shaped = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(fl.FrostlineError, match=r"it has 2.weight \[3, 8\] instead of \[2, 8\], 2.bias"):
        fl.train_only(shaped, plan)
    for text, message in (("[]", "holds no plan"), ("{", "is no JSON"), ('{"kind": "plan"}', "is no whole plan")):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(fl.FrostlineError, match=message):
            fl.Plan.load(tmp_path / "other.json")
    with pytest.raises(fl.FrostlineError, match="there is no plan to read at"):
        fl.Plan.load(tmp_path / "none.json")


def test_a_plan_reads_in_words() -> None:
    trace = traced()
    plan = fl.plan(trace, {"step_flops": "60%"}, worth(trace))
    text = " ".join(str(plan).split())
    assert text.startswith("train 2 of 4 tensors, 20 % of the parameters: 2 budget")
    assert "importance won: 2 of 4 (50 %); proven: no subset within the budget has more" in text
    assert "backward reaches 2.weight" in text


# -- frontiers --------------------------------------------------------------------------------------------------------


def test_a_frontier_goes_from_the_least_to_everything_and_never_down(encoder: fl.Trace, tmp_path: Path) -> None:
    scores = {name: float(number % 7) for number, name in enumerate(encoder.parameters)}
    frontier = fl.frontier(encoder, "step_flops", scores, points=6)
    won = [plan.objective for plan in frontier]
    assert won == sorted(won)
    assert len(frontier) == 6
    assert frontier[0].cost.step_flops == encoder.cost("head.bias").step_flops
    assert won[-1] == frontier[-1].total == sum(scores.values())
    for plan in frontier:
        single = fl.plan(encoder, {"step_flops": plan.budget["step_flops"]}, scores)
        assert single.objective == plan.objective
        assert plan.gap == 0
    ends = [(frontier[n].cost.step_flops, frontier[n].objective) for n in (0, -1)]
    slope = (ends[1][1] - ends[0][1]) / (ends[1][0] - ends[0][0])
    above = [p.objective - ends[0][1] - slope * (p.cost.step_flops - ends[0][0]) for p in frontier]
    assert above[frontier.knee] == max(above)
    assert frontier.at_knee is frontier[frontier.knee]
    data = json.loads(json.dumps(frontier.to_dict()))
    jsonschema.Draft202012Validator(schema()).validate(data)
    assert data["knee"] == frontier.knee
    assert "knee" in str(frontier)
    assert max(map(len, str(frontier).splitlines())) <= 100
    frontier.plot(tmp_path / "curve.svg")
    assert "importance won" in (tmp_path / "curve.svg").read_text()


def test_a_frontier_keeps_to_the_rest_of_the_budget(encoder: fl.Trace) -> None:
    frontier = fl.frontier(encoder, "step_flops", worth(encoder), points=3, budget={"saved_bytes": "30%"}, by="layer")
    assert all(plan.cost.saved_bytes <= plan.budget["saved_bytes"] for plan in frontier)
    with pytest.raises(fl.FrostlineError, match=r"step_flops is what the frontier goes over"):
        fl.frontier(encoder, "step_flops", worth(encoder), budget={"step_flops": "50%"})
    with pytest.raises(fl.FrostlineError, match="a frontier has at least 2 points, got 1"):
        fl.frontier(encoder, "step_flops", worth(encoder), points=1)
    with pytest.raises(fl.FrostlineError, match=r"call trace.calibrate\(\) first"):
        fl.frontier(encoder, importance=worth(encoder))
