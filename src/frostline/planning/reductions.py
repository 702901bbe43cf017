"""One gradient -> one number, in float64 and without a copy of the whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from frostline.subsets.names import listed

KINDS = ("taylor", "gradient_norm", "gradient_l1", "relative_gradient_norm")
PIECE = 1 << 16  # elements that are widened to float64 at a time


class Reduction:
    """Reduces the gradients of ``parameters``, whose values do not change meanwhile, by one of `KINDS`."""

    def __init__(self, kind: str, parameters: Mapping[str, nn.Parameter]) -> None:
        self.kind = kind
        self.parameters = parameters

    def __call__(self, name: str, gradient: Tensor) -> Tensor:
        """The scalar of one batch, on the gradient's device: the last step, `finish`, comes after the sum."""
        if self.kind == "taylor":
            return _dot(self.parameters[name].detach(), gradient).abs()
        return _absolute_sum(gradient) if self.kind == "gradient_l1" else _norm(gradient)

    def weight_is_finite(self, name: str) -> bool:
        return math.isfinite(_norm(self.parameters[name].detach()).item())

    def finish(self, sums: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
        """Scores from the sums over all batches, and notes."""
        if self.kind != "relative_gradient_norm":
            return dict(sums), []
        norms = {name: _norm(self.parameters[name].detach()).item() for name in sums}
        scores = {name: value / norms[name] if norms[name] else 0.0 for name, value in sums.items()}
        unbounded = [name for name, value in sums.items() if value and not norms[name]]
        if not unbounded:
            return scores, []
        largest = max(scores.values()) or 1.0
        scores.update(dict.fromkeys(unbounded, largest))
        return scores, [
            f"{len(unbounded)} parameters are all zeros, so that no norm is relative to theirs; they are given the "
            f"largest score of the others: {listed(unbounded, 5)}"
        ]


def _norm(tensor: Tensor) -> Tensor:
    squares = [piece.dot(piece) for (piece,) in _pieces(_elements(tensor))]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())


def _absolute_sum(tensor: Tensor) -> Tensor:
    sums = [piece.abs().sum() for (piece,) in _pieces(_elements(tensor))]
    return torch.stack(sums).sum() if sums else torch.zeros(())


def _elements(tensor: Tensor) -> Tensor:
    """Of a sparse tensor those that are there; an id that comes twice has one row in the gradient."""
    return tensor if tensor.layout == torch.strided else tensor.coalesce().values()


def _dot(weight: Tensor, gradient: Tensor) -> Tensor:
    if gradient.layout != torch.strided:
        gradient = gradient.coalesce()
        weight, gradient = weight[tuple(gradient.indices())], gradient.values()
    products = [a.dot(b) for a, b in _pieces(weight, gradient)]
    return torch.stack(products).sum() if products else torch.zeros(())


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape as flat float64 pieces, element beside element, whatever their strides."""
    first = tensors[0]
    if not first.numel():
        return
    if first.numel() > PIECE and first.dim():
        longest = max(range(first.dim()), key=first.size)
        rows = max(1, PIECE * first.size(longest) // first.numel())
        if rows < first.size(longest):
            for parts in zip(*(tensor.split(rows, longest) for tensor in tensors), strict=True):
                yield from _pieces(*parts)
            return
    yield tuple(_wide(tensor) for tensor in tensors)


def _wide(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.to(torch.float32 if tensor.device.type == "mps" else torch.float64).reshape(-1)  # mps has no float64
