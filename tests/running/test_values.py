"""Checksums of tensors: the same bits give the same, and what has no bits has none."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from frostline.running.values import changed, digests


def digest(tensor: Tensor) -> bytes | None:
    return digests([("it", tensor)])["it"]


def test_a_checksum_is_of_the_numbers_and_not_of_how_they_lie() -> None:
    tensor = torch.arange(6.0).view(2, 3)
    assert digest(tensor) == digest(tensor.t().contiguous().t())
    assert digest(tensor) != digest(tensor.view(3, 2))
    assert digest(tensor[1:]) != digest(tensor[:1])
    assert digest(tensor.to_sparse()) == digest(tensor.clone().to_sparse())
    assert digest(torch.ones(2, dtype=torch.cfloat).conj()) == digest(torch.ones(2, dtype=torch.cfloat).conj_physical())


def test_a_nan_is_no_change() -> None:
    before = digests([("it", torch.tensor([float("nan")]))])
    assert changed(before, digests([("it", torch.tensor([float("nan")]))])) == []


def test_what_is_empty_has_one_and_what_is_not_in_memory_has_none() -> None:
    freed = torch.ones(3)
    freed.untyped_storage().resize_(0)
    with FakeTensorMode():
        fake = torch.ones(3)
    assert digest(torch.ones(0, 3)) is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [digest(tensor) for tensor in (torch.ones(3, device="meta"), fake, freed)] == [None] * 3


def test_taking_one_leaves_the_storage_resizable() -> None:
    tensor = torch.ones(3)
    digest(tensor)
    assert tensor.untyped_storage().resizable()
