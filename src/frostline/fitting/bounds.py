"""Where a sequence has to end, whatever the memory: tables of positions."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from frostline.tracing.calls import Side
from frostline.tracing.trace import Trace


def longest(trace: Trace, length: int) -> tuple[int | None, str]:
    """The longest sequence that the model has positions for, and how that is known; None if nothing tells.

    A table read by positions that follow from the length alone is found on the tape: fake tensors do not notice that
    an index is out of range.
    """
    found: dict[int, str] = {}
    for rows, module in _tables(trace, length):
        found.setdefault(rows, f"{module or 'the model'} has {rows:,} positions")
    config = getattr(trace.model, "config", None)
    configured = getattr(config, "max_position_embeddings", None)
    if isinstance(configured, int) and configured > 0:
        configured -= _offset(trace.model)
        found.setdefault(configured, f"the config's max_position_embeddings allows {configured:,}")
    if not found:
        return None, ""
    least = min(found)
    return least, found[least]


def _tables(trace: Trace, length: int) -> Iterator[tuple[int, str]]:
    """Rows and module of each table read by one index a position. One with fewer rows is of something else."""
    for unit in trace.graph.units:
        for op in unit.ops:
            if str(op.target) != "aten.embedding.default":
                continue
            table, index = op.inputs[:2]
            shape, rows = index.meta.shape, table.meta.shape[0]
            by_position = shape in ((length,), (1, length)) or (len(shape) == 2 and length == shape[1] != shape[0])
            if index.side is not Side.DATA and by_position and length <= rows:
                yield rows, op.module


def _offset(model: nn.Module) -> int:
    """Rows of a position table that no position uses (RoBERTa counts from ``padding_idx`` + 1)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings") and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def hints(model: nn.Module) -> set[int]:
    """Lengths at which a table may end: the sizes of parameters and buffers that are named for positions."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {size for name, t in tensors for size in t.shape if "pos" in name.lower() or "mask" in name.lower()}
