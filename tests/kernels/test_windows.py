"""Where in its window a maximum was: the same byte, and the same index again, by the loops in C and by torch's ops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from frostline.kernels import lean_kernels, windows
from frostline.kernels.lean import NotCoveredError

POOLS = [
    ((7, 9), {"kernel_size": 2}),
    ((7, 9), {"kernel_size": 3, "stride": 2, "padding": 1}),
    ((8, 8), {"kernel_size": (2, 3), "stride": (1, 2), "ceil_mode": True}),
    ((9, 140), {"kernel_size": 3, "stride": 2, "padding": 1}),  # a byte cannot tell how far: it tells which
    ((20, 20), {"kernel_size": 3, "dilation": 4}),
    ((5, 6, 7), {"kernel_size": 2, "stride": 1}),
    ((5, 6, 7), {"kernel_size": 3, "stride": 2, "padding": 1}),
]


def of(shape: tuple[int, ...], how: dict) -> windows.Windows:
    def each(name: str, default: int) -> tuple[int, ...]:
        given = how.get(name, default)
        return given if isinstance(given, tuple) else (given,)

    stride = each("stride", 0) if "stride" in how else ()
    return windows.windows_of(shape, each("kernel_size", 0), stride, each("padding", 0), each("dilation", 1))


@pytest.mark.parametrize(("shape", "how"), POOLS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels last", "no batch", "apart"])
@pytest.mark.parametrize("loops", [windows._loops, None])
def test_indices_come_back(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], how: dict, layout: str, loops: object
) -> None:
    x = torch.randn(2, 3, *shape)
    if layout == "channels last":
        x = x.to(memory_format=torch.channels_last if len(shape) == 2 else torch.channels_last_3d)
    pool = F.max_pool2d if len(shape) == 2 else F.max_pool3d
    _, indices = pool(x[0] if layout == "no batch" else x, return_indices=True, **how)
    indices = in_every_second_place(indices) if layout == "apart" else indices
    seen = of(shape, how)
    with_loops = seen.pack(indices)
    monkeypatch.setattr(windows, "_loops", loops)
    packed = seen.pack(indices)
    assert packed.dtype == torch.uint8
    assert torch.equal(packed, with_loops)
    found = seen.unpack(packed)
    assert torch.equal(found, indices)
    assert layout == "apart" or found.stride() == indices.stride()


def in_every_second_place(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


def test_a_window_without_an_element_of_the_input_is_not_covered() -> None:
    with pytest.raises(NotCoveredError, match="no element"):
        windows.windows_of((9, 9), (3,), (1,), (1,), (2,))
    assert windows.windows_of((9, 9), (3, 3), (), (1, 1), (1, 1)) == windows.windows_of((9, 9), (3,), (), (1,), (1,))


@pytest.mark.parametrize(
    "how",
    [{"kernel_size": 0}, {"kernel_size": (2, 2, 2)}, {"kernel_size": 2, "stride": (1, 1, 1)}, {"kernel_size": 99}],
    ids=str,
)
def test_what_torch_refuses_it_refuses_as_ever(how: dict) -> None:
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    with pytest.raises(RuntimeError) as eager:
        F.max_pool2d(x, **how)
    with lean_kernels(), pytest.raises(RuntimeError) as ours:
        F.max_pool2d(x, **how)
    assert str(ours.value) == str(eager.value)
