"""Slices: how they are read and spelled, joined and taken away."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from frostline.errors import SubsetError
from frostline.subsets import TensorSlice, resolve


def test_slice_trains_a_part(mlp):
    subset = resolve("0.weight[:, 8:],2", mlp)
    assert subset.names == ("0.weight", "2.weight", "2.bias")
    assert subset.slices["0.weight"][0].index == (slice(0, 32, 1), slice(8, 16, 1))
    assert subset.num_elements("0.weight") == 32 * 8
    assert subset.num_elements("0.bias") == 0
    assert subset.num_parameters() == 32 * 8 + 4 * 32 + 4
    assert not subset.is_whole("0.weight")
    assert subset.is_whole("2.weight")
    assert len(subset) == 3


@pytest.mark.parametrize(
    ("written", "spelled"),
    [
        ("[30:]", "[30:]"),
        ("[-2:]", "[30:]"),
        ("[3, :]", "[3:4]"),
        ("[-1, -1]", "[31:, 15:]"),
        ("[..., 0]", "[:, :1]"),
        ("[4:8, ...]", "[4:8]"),
        ("[::2]", "[::2]"),
        ("[1:32:5,]", "[1::5]"),
        ("[:7:5]", "[:6:5]"),
        ("[0:1:9]", "[:1]"),
        ("[ 2 : 4 ]", "[2:4]"),
        ("[30:99]", "[30:]"),
    ],
)
def test_slice_prints_as_python_writes_it(written, spelled, mlp):
    assert resolve(f"0.weight{written}", mlp).spelled() == (f"0.weight{spelled}",)


def test_glob_before_the_bracket_slices_each(model):
    subset = resolve("layer.*.norm.*[:4]", model)
    assert len(subset.slices) == 6
    assert subset.num_parameters() == 6 * 4


def test_slice_of_everything_is_the_whole_tensor(mlp):
    assert resolve("0.weight[:, :]", mlp) == resolve("0.weight", mlp)
    assert resolve("0.weight[:32, :999]", mlp).slices == {}


def test_slices_of_one_tensor_are_joined(mlp):
    assert resolve("0.weight[:4],0.weight[4:8]", mlp).spelled() == ("0.weight[:8]",)
    overlapping = resolve(["0.weight[:10]", "0.weight[5:, :4]"], mlp)
    assert overlapping.num_elements("0.weight") == 10 * 16 + 22 * 4
    assert resolve("0.weight[::2],0.weight[1::2]", mlp) == resolve("0.weight", mlp)


def test_whole_and_slice_is_whole(mlp):
    assert resolve("0.weight,0.weight[:4]", mlp) == resolve("0.weight", mlp)
    assert resolve("0.weight[:4],0.weight", mlp) == resolve("0.weight", mlp)


def test_slice_can_be_taken_away(mlp):
    assert resolve("0.weight,!0.weight[:, 4:8]", mlp).spelled() == ("0.weight[:, :4]", "0.weight[:, 8:]")
    assert resolve("0.weight[:8],!0.weight[4:]", mlp).spelled() == ("0.weight[:4]",)
    assert resolve("0,!0.weight[:]", mlp).names == ("0.bias",)


def test_spelled_resolves_to_the_same_subset(mlp):
    subset = resolve("0.weight[::3, 2:9],0.weight[5, :],2.bias", mlp)
    assert resolve(list(subset.spelled()), mlp) == subset
    assert resolve(subset, mlp) == subset


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("0.weight[32:]", r"0.weight\[32:\], where 0.weight has shape \[32, 16\]: '32:' holds nothing in dimension 0"),
        ("0.weight[4:4, :]", "holds nothing"),
        ("0.weight[32, :]", "index 32 is out of range for dimension 0, which has size 32"),
        ("0.weight[:, -17]", "index -17 is out of range for dimension 1"),
        ("0.bias[:, 2]", "2 given for 1 dimensions"),
        ("0.weight[::-1]", "A step must be 1 or more"),
        ("0.weight[::0]", "A step must be 1 or more"),
        ("0.weight[a:b]", "cannot read 'a:b'"),
        ("0.weight[:, None]", "cannot read 'None'"),
        ("0.weight[1:2:3:4]", "cannot read"),
        ("0.weight[..., ...]", "one '...' only"),
        ("0[:, 2]", r"'0' is a module \(Linear\) and only a parameter can be sliced. It holds 0.weight, 0.bias"),
        ("3.weight[:2]", r"'3.weight\[:2\]' matches no parameter .* Closest: "),
        ("*[:, 2]", "2 given for 1 dimensions"),
    ],
)
def test_slice_that_does_not_fit_is_an_error(pattern, says, mlp):
    with pytest.raises(SubsetError, match=says):
        resolve(pattern, mlp)


def test_too_many_slices_of_one_tensor_are_an_error():
    with pytest.raises(SubsetError, match="falls into 2000 slices"):
        resolve("!weight[::2000]", nn.Linear(1, 40_000))


def test_slice_of_a_scalar_is_the_scalar():
    model = nn.Module()
    model.scale = nn.Parameter(torch.ones(()))
    assert resolve("scale[...,]", model) == resolve("scale", model)
    assert str(TensorSlice.whole(())) == "[...]"


def test_part_outside_of_its_tensor_is_an_error():
    with pytest.raises(SubsetError, match="no part of a tensor of shape"):
        TensorSlice((4,), (range(2, 6),))


SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


@st.composite
def shape_and_index(draw):
    """A shape and the text of an index that Python accepts for it; it may hold nothing."""
    shape = draw(SHAPES)
    parts = []
    count = draw(st.integers(1, len(shape)))
    leading = draw(st.booleans())  # "[..., 2]" indexes the last dimensions, "[2, ...]" and "[2]" the first
    for size in shape[-count:] if leading else shape[:count]:
        bound = st.one_of(st.just(""), st.integers(-size - 2, size + 2).map(str))
        step = st.sampled_from(["", ":", ":1", ":2", ":5"])
        sliced = st.tuples(bound, bound, step).map(lambda s: f"{s[0]}:{s[1]}{s[2]}")
        parts.append(draw(st.one_of(sliced, st.integers(-size, size - 1).map(str))))
    if leading or draw(st.booleans()):
        parts.insert(0 if leading else count, "...")
    return shape, f"[{', '.join(parts)}]"


@settings(deadline=None, max_examples=200)
@given(shape_and_index())
def test_slice_holds_what_torch_takes(case):
    shape, text = case
    taken = eval(f"tensor{text}", {"tensor": torch.arange(torch.Size(shape).numel()).reshape(shape)})
    if not taken.numel():
        with pytest.raises(SubsetError, match="holds nothing"):
            TensorSlice.parse(text, shape)
        return
    part = TensorSlice.parse(text, shape)
    assert part.numel == taken.numel()
    ours = torch.arange(torch.Size(shape).numel()).reshape(shape)[part.index]
    assert ours.shape == part.shape
    assert torch.equal(ours.flatten(), taken.flatten())
    assert TensorSlice.parse(str(part), shape) == part


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_union_and_difference_of_slices_are_those_of_their_elements(data):
    shape = data.draw(st.lists(st.integers(2, 12), min_size=1, max_size=3).map(tuple))
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.zeros(shape))
    expected = torch.zeros(shape, dtype=torch.bool)
    patterns = []
    for _ in range(data.draw(st.integers(1, 4))):
        dims = []
        for size in shape:
            start = data.draw(st.integers(0, size - 1))
            dims.append(slice(start, data.draw(st.integers(start + 1, size)), data.draw(st.integers(1, 4))))
        away = bool(patterns) and data.draw(st.booleans())
        expected[tuple(dims)] = not away
        patterns.append(("!" if away else "") + f"weight[{', '.join(f'{d.start}:{d.stop}:{d.step}' for d in dims)}]")
    if not expected.any():
        with pytest.raises(SubsetError, match="nothing to train"):
            resolve(patterns, layer)
        return
    subset = resolve(patterns, layer)
    times = torch.zeros(shape, dtype=torch.int64)
    for part in subset.slices.get("weight", (TensorSlice.whole(shape),)):
        times[part.index] += 1
    assert torch.equal(times, expected.long())  # each element once, so the parts do not overlap
    assert subset.num_parameters() == expected.sum()
