"""Gradients are sacred: inside a run they are those of plain PyTorch, to the bit and in the same strides."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from tests.cases import CASES, DEVICE, Case, subsets_for
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import frostline as fl
from benchmarks.models import Bottleneck

PRECISIONS = ("float32", "float64", "autocast")
FEW = 8  # subsets of each model


def built(name: str, precision: str) -> Case:
    case = CASES[name]()
    if precision == "float64":
        case.model.double()

        def double(value: object) -> object:
            return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

        case.inputs = tree_map(double, case.inputs)
    return case


def gradients(case: Case, precision: str) -> dict[str, Tensor | None]:
    mode: AbstractContextManager[object] = nullcontext()
    if precision == "autocast":
        mode = torch.autocast(torch.device(DEVICE).type, torch.bfloat16)
    with mode:
        loss = case.run()
    if loss.requires_grad:
        loss.backward()
    return {name: parameter.grad for name, parameter in case.model.named_parameters()}


def gradients_anew(name: str, precision: str, train: Collection[str]) -> dict[str, Tensor | None]:
    case = built(name, precision)
    freeze(case, train)
    return gradients(case, precision)


def freeze(case: Case, train: Collection[str]) -> None:
    for name, parameter in case.model.named_parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(name in train)


def same(ours: Tensor | None, theirs: Tensor | None) -> bool:
    if ours is None or theirs is None:
        return ours is theirs
    if theirs.is_sparse:
        return torch.equal(ours.to_dense(), theirs.to_dense())
    alike = (ours.stride(), ours.dtype) == (theirs.stride(), theirs.dtype)
    return alike and torch.equal(bits(ours), bits(theirs))


def bits(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.reshape(-1).view(torch.uint8)


@pytest.mark.filterwarnings("ignore")  # whatever torch warns of in a precision that a model was not written for
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CASES)
def test_gradients_of_a_run_are_plain_pytorchs_to_the_bit(name: str, precision: str) -> None:
    if CASES[name].missing:
        pytest.skip(CASES[name].missing)
    subsets = list(subsets_for(CASES[name]()).values())
    ran = 0
    for train in subsets[:: -(-len(subsets) // FEW)]:
        try:
            expected = gradients_anew(name, precision, train)
        except RuntimeError:  # eager refuses this step in this precision, or these flags
            continue
        case = built(name, precision)
        with fl.train_only(case.model, list(train)):
            found = gradients(case, precision)
        wrong = [n for n in expected if not same(found[n], expected[n])]
        if wrong and DEVICE != "cpu":  # of kernels that add in no fixed order, eager itself gives now this and now that
            again = [gradients_anew(name, precision, train) for _ in range(4)]
            wrong = [n for n in wrong if all(same(other[n], expected[n]) for other in again)]
        assert not wrong, (train, wrong)
        ran += 1
    if not ran:
        pytest.skip("eager runs none of it")


def resnet101() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    layers.append(nn.MaxPool2d(3, 2, 1))
    n_in = 64
    for stage, depth in enumerate((3, 4, 23, 3)):
        for block in range(depth):
            layers.append(Bottleneck(n_in, 64 << stage, 2 if stage and not block else 1))
            n_in = 256 << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def nll(logits: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


@pytest.mark.parametrize(("training", "bound"), [(False, 0.158), (True, 4.03)])
def test_resnet_101_keeps_what_its_first_convolution_needs(training: bool, bound: float) -> None:
    """The case that memsave_torch shows itself on, 64 images; ``bound``: GiB that the gradient needs at least."""
    with torch.device("meta"):
        model = resnet101().train(training)
    trace = fl.trace(model, torch.empty(64, 3, 224, 224, device="meta"), loss=nll)
    assert trace.cost("0.weight").saved_bytes > 7.5 * 2**30
    assert trace.cost("0.weight", method="train-only").saved_bytes <= 1.05 * bound * 2**30


@pytest.mark.parametrize("training", [False, True])
def test_resnet_101_really_run_keeps_what_its_cost_says(training: bool) -> None:
    torch.manual_seed(0)
    model, images = resnet101().train(training), torch.randn(2, 3, 64, 64)
    cost = fl.trace(model, images, loss=nll).cost("0.weight", method="train-only")
    with fl.train_only(model, "0.weight") as run:
        audit = run.audit(lambda: nll(model(images)).backward(), strict=True, cost=cost)
    assert audit.kept_bytes == audit.planned_bytes == cost.saved_bytes


def test_the_comparison_sees_a_bit_and_a_stride() -> None:
    a = torch.zeros(2, 3)
    assert same(a, a.clone())
    assert not same(a, -a)
    assert not same(a, torch.zeros(3, 2).t())
    assert not same(a, None)
