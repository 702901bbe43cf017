"""Running one function with and without lean kernels, and comparing everything that comes of it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from frostline.kernels import lean_kernels

SPECIAL = (float("inf"), -float("inf"), float("nan"), -0.0, 0.0, 1e-40, -1e-40, 6.0, -1.0, 1.0)


def tensor(*shape: int, dtype: torch.dtype = torch.float32, special: bool = True, last: bool = False) -> Tensor:
    """Random numbers, special ones among them; ``last``: channels last."""
    x = torch.randn(shape) * 3
    if special:
        x.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL)[: x.numel()]
    x = x.to(dtype)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.to(memory_format=formats[x.dim()]) if last and x.dim() in formats else x


def run(function: Callable[..., Tensor], inputs: Sequence[Tensor], *, lean: bool) -> list[Tensor]:
    """The result and the gradients of those ``inputs`` that require one; nothing of the forward lives but its graph."""
    leaves = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
    torch.manual_seed(0)
    given = [x * 1 if x.requires_grad else x for x in leaves]
    if lean:
        with lean_kernels() as kernels:
            result = function(*given)
        assert not kernels.fallbacks
    else:
        result = function(*given)
    torch.manual_seed(1)
    gradient = torch.randn(result.shape, dtype=torch.float64).to(result.dtype)
    values, edge = result.detach().clone(), get_gradient_edge(result)
    del given, result
    return [values, *torch.autograd.grad(edge, [x for x in leaves if x.requires_grad], gradient)]


def assert_bitwise(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.stride() == expected.stride()
    assert torch.equal(found.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(found[numbers], expected[numbers])
    assert torch.equal(torch.signbit(found[numbers]), torch.signbit(expected[numbers]))


def assert_same(function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """With lean kernels all is as without, to the bit."""
    for found, expected in zip(run(function, inputs, lean=True), run(function, inputs, lean=False), strict=True):
        assert_bitwise(found, expected)


def storages(tensors: Sequence[Tensor]) -> set[int]:
    return {t.untyped_storage()._cdata for t in tensors}


def _saved(node: object) -> list[object]:
    """What a node of torch's own saved, or what hooks made of it: a tensor left out is none."""
    found: list[object] = []
    for name in dir(node):
        if name.startswith("_raw_saved_"):
            raw = getattr(node, name)
            found += [each.data for each in (raw if isinstance(raw, tuple | list) else [raw])]
    return found


def kept_nbytes(result: Tensor, own: Sequence[Tensor] = ()) -> int:
    """Bytes of the distinct storages that the graph of ``result`` holds, but for those of ``own`` tensors."""
    seen: dict[int, int] = {}
    nodes, stack = set(), [result.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in nodes:
            continue
        nodes.add(node)
        stack += [below for below, _ in node.next_functions]
        holder = getattr(node, "holder", None)
        saved = [*getattr(node, "saved_tensors", ())] if hasattr(node, "needs_input_grad") else _saved(node)
        saved += [] if holder is None else [holder.kept if holder.packed is None else holder.packed]
        for value in saved:
            for t in value if isinstance(value, tuple | list) else [value]:
                if isinstance(t, Tensor):
                    seen[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
    gc.collect()
    return sum(nbytes for key, nbytes in seen.items() if key not in storages(own))
