"""A model's names: ties, shared modules, parameters without values or shapes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tests.subsets.networks import NETWORKS, TiedLM, Transformer, hugging_face
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from frostline.errors import SubsetError
from frostline.subsets import resolve
from frostline.subsets.names import Names


def test_any_name_of_a_tied_parameter_means_it():
    for name in ("lm_head", "lm_head.weight", "lm_*", "embeddings"):
        assert resolve(name, TiedLM()).names == ("embeddings.weight",)
    assert "lm_head.weight is tied to embeddings.weight" in str(resolve("lm_head", TiedLM()).matched[0])
    assert resolve("embeddings", TiedLM()).matched[0].note == ""


def test_slice_of_a_tied_name_is_a_slice_of_the_parameter():
    assert resolve("lm_head.weight[18:]", TiedLM()).spelled() == ("embeddings.weight[18:]",)


@pytest.mark.parametrize("mode", [lambda: torch.device("meta"), FakeTensorMode])
def test_meta_and_fake_parameters_resolve_as_real_ones_do(mode):
    with mode():
        built = TiedLM()
    for train in ("@all", "@head", "@norms", "@biases", "@last:2", "lm_head.weight[2:, :3]"):
        assert resolve(train, built) == resolve(train, TiedLM())


def test_lazy_parameters_need_a_forward_first():
    lazy = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))
    with pytest.raises(SubsetError, match="Run one forward first"):
        resolve("1", lazy)
    lazy(torch.zeros(1, 3))
    assert resolve("0", lazy).num_parameters() == 3 * 4 + 4


class Unwrapped(nn.Module):
    """Names its parameters as if it were not there, as FSDP and checkpoint wrappers do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def named_parameters(self, *args, **kwargs) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name.removeprefix("inner."), param) for name, param in super().named_parameters(*args, **kwargs))


class Closed(nn.Sequential):
    """Does not show the modules inside, wherever it lies in a model."""

    def named_modules(self, memo=None, prefix="", remove_duplicate=True) -> Iterator[tuple[str, nn.Module]]:
        yield prefix, self


def renamed_instance() -> nn.Module:
    model = nn.Linear(2, 2)
    weight = model.weight
    model.named_parameters = lambda *args, **kwargs: iter([("renamed", weight)])  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize(
    "build",
    [
        *NETWORKS,
        lambda: hugging_face("bart"),
        lambda: Unwrapped(TiedLM()),
        lambda: nn.Sequential(nn.Linear(2, 2), Closed(nn.Linear(2, 2))),
        renamed_instance,
    ],
)
def test_names_and_their_order_are_those_of_named_parameters(build):
    model = build()
    names = Names(model)
    torchs = list(model.named_parameters())
    assert [(name, id(param)) for name, param in names.params.items()] == [(name, id(param)) for name, param in torchs]
    canonical = {id(param): name for name, param in torchs}
    everywhere = model.named_parameters(remove_duplicate=False)
    assert list(names.aliases.items()) == [(name, canonical[id(param)]) for name, param in everywhere]


def test_model_may_change_between_one_reading_and_the_next():
    model = Transformer()
    asked = ["embeddings.weight", "classifier.weight"]
    assert resolve(asked, model).names == tuple(asked)
    model.lm_head = nn.Linear(8, 20, bias=False)
    assert resolve([*asked, "lm_head.weight"], model).names == (*asked, "lm_head.weight")
    model.lm_head.weight = model.embeddings.weight
    tied = resolve([*asked, "lm_head.weight"], model)
    assert tied.names == tuple(asked)
    assert tied.matched[2].note == "lm_head.weight is tied to embeddings.weight"
    model.classifier.weight = nn.Parameter(torch.zeros(3, 8))
    assert resolve(asked, model).shapes["classifier.weight"] == (3, 8)
    model.requires_grad_(False)
    model.norm.requires_grad_(True)
    assert resolve(None, model).names == ("norm.weight", "norm.bias")
    assert resolve(asked, model).names == tuple(asked)
    del model.classifier
    with pytest.raises(SubsetError, match=r"'classifier.weight' matches no parameter"):
        resolve(asked, model)
