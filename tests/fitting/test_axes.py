"""Which dimensions are taken for the batch and for the length."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from frostline.errors import FitError
from frostline.fitting.axes import batch_axis, length_axis, named_tensors
from frostline.fitting.resizing import tiled


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def ids(*shape: int) -> Tensor:
    return zeros(*shape, dtype=torch.int64)


def test_the_batch_is_dimension_0_of_all_with_as_many_rows_as_the_first() -> None:
    inputs = {"image": zeros(8, 3, 4, 4), "scale": zeros(3), "label": ids(8)}
    axis = batch_axis(inputs, {"loss.target": zeros(8, 2), "loss.weight": zeros(2)}, None)
    assert (axis.size, axis.given) == (8, False)
    assert dict(axis.places) == {"image": (0,), "label": (0,), "loss.target": (0,)}
    assert str(axis) == "dimension 0 of image, label and loss.target (8 as found)"
    assert axis.resized("image", (8, 3, 4, 4), 20) == (20, 3, 4, 4)
    assert axis.resized("scale", (3,), 20) == (3,)


def test_it_can_be_given() -> None:
    inputs = {"frames": zeros(50, 4, 9), "sizes": ids(4)}
    axis = batch_axis(inputs, {}, {"frames": 1, "1": [0]})
    assert (axis.size, dict(axis.places)) == (4, {"frames": (1,), "sizes": (0,)})
    assert str(axis).endswith("(4 as given)")
    assert dict(batch_axis(inputs, {}, 1).places) == {"frames": (1,)}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"frame": 0}, r"no tensor 'frame'; there is frames\[50, 4\], sizes\[3\]"),
        ({"frames": 2}, r"frames has no dimension 2, its shape is \(50, 4\)"),
        ({"frames": 0, "sizes": 0}, "differ in size: 50 in frames, 3 in sizes"),
        (3, "no batch dimension was found"),
    ],
)
def test_what_is_given_wrong_is_named(asked: object, message: str) -> None:
    with pytest.raises(FitError, match=message):
        batch_axis({"frames": zeros(50, 4), "sizes": zeros(3)}, {}, asked)  # type: ignore[arg-type]


def test_inputs_without_a_dimension_have_no_batch() -> None:
    with pytest.raises(FitError, match="--batch-dim NAME=0"):
        batch_axis({"step": zeros()}, {}, None)
    with pytest.raises(FitError, match="no input tensor"):
        batch_axis({}, {}, None)


def test_the_length_is_dimension_1_of_integers_and_of_what_shares_both_sizes() -> None:
    inputs = {"noise": zeros(4, 16), "ids": ids(4, 16), "mask": zeros(4, 16), "image": zeros(4, 3), "table": ids(7, 16)}
    labels = {"loss.flat": ids(64), "loss.labels": ids(4, 16)}
    batch = batch_axis(inputs, labels, None)
    length, batch = length_axis(inputs, labels, batch, None)
    assert length is not None
    assert set(length.places) == {"noise", "ids", "mask", "loss.labels", "loss.flat"}
    shape = length.resized("loss.flat", batch.resized("loss.flat", (64,), 8), 10)
    assert shape == (80,)  # batch x length


def test_images_have_no_length() -> None:
    inputs = {"image": zeros(4, 3, 8, 8), "label": ids(4)}
    assert length_axis(inputs, {}, batch_axis(inputs, {}, None), None)[0] is None


def test_inputs_are_named_as_forward_names_them() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, pair: tuple[Tensor, Tensor], *rest: Tensor, mask: dict[str, Tensor]) -> Tensor:
            return x

    given = named_tensors(Net(), (zeros(1), (zeros(2), zeros(3))), {"mask": {"left": zeros(4)}})
    assert {name: t.shape[0] for name, t in given.items()} == {"x": 1, "pair.0": 2, "pair.1": 3, "mask.left": 4}


def test_tiles_keep_values_type_and_layout() -> None:
    image = torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)
    more = tiled(image, (5, 3, 4, 5), real=True)
    assert torch.equal(more[2:4], image)
    assert torch.equal(more[4], image[0])
    assert more.is_contiguous(memory_format=torch.channels_last)
    none = tiled(image, (5, 3, 4, 5), real=False)
    assert (none.device.type, none.stride(), none.dtype) == ("meta", more.stride(), torch.float32)
    assert tiled(ids(2, 3), (3, 3), real=True).dtype == torch.int64
    assert tiled(zeros(2).requires_grad_(), (3,), real=True).requires_grad
