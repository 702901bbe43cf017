"""The repeated blocks of a model: what ``@last:K`` counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from frostline.subsets.kinds import is_norm
from frostline.subsets.names import Names, prefixes, within


@dataclass(frozen=True)
class _Stack:
    """A container of alike modules."""

    path: str
    kind: type[nn.Module]  # the class most of its children have
    blocks: tuple[str, ...]


def _stack_at(names: Names, path: str) -> _Stack | None:
    """Read a ModuleList, ModuleDict or Sequential whose children are built of modules themselves."""
    container = names.modules[path]
    if not isinstance(container, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        return None
    # A block that only holds what is registered elsewhere already (a shared layer) is no block of its own.
    children = [child for child in names.children_of(path) if names.num_inside.get(child)]
    kinds = Counter(type(names.modules[child]) for child in children if names.children_of(child))
    if not kinds:
        return None
    kind = kinds.most_common(1)[0][0]
    if isinstance(container, nn.Sequential):  # a whole network may lie in one: stem, blocks, head
        children = [child for child in children if type(names.modules[child]) is kind]
    return _Stack(path, kind, tuple(children))


def _inner_stack(names: Names, stage: str) -> _Stack | None:
    """Return the container of modules of one class that makes up most of a stage, or None."""
    for path in names.modules:
        if within(path, stage) and 2 * names.num_inside.get(path, 0) > names.num_inside.get(stage, 0):
            stack = _stack_at(names, path)
            if stack and all(type(names.modules[block]) is stack.kind for block in stack.blocks):
                return stack
    return None


def _opened(names: Names, found: tuple[str, ...]) -> tuple[str, ...]:
    """Open stages: where each block holds a container of blocks, and these differ in width from stage to stage.

    Experts in a mixture are containers as well, but have the same shapes in every layer: those stay closed.
    """
    stacks: list[_Stack] = []
    for block in found:
        stack = _inner_stack(names, block)
        if stack is None:
            return found
        stacks.append(stack)
    first = {tuple(names.params[name].shape for name in names.params_of(stack.blocks[0])) for stack in stacks}
    if len(first) < 2:
        return found
    return _opened(names, tuple(block for stack in stacks for block in stack.blocks))


def _siblings(a: str, b: str) -> bool:
    """Whether two containers lie at the same place of two sibling modules: ``encoder.layers``, ``decoder.layers``."""
    left, right = a.split("."), b.split(".")
    return (
        len(left) == len(right)
        and left[-1] == right[-1]
        and sum(mine != theirs for mine, theirs in zip(left, right, strict=True)) == 1
    )


def repeated(names: Names) -> tuple[str, ...]:
    """Return the repeated blocks, or nothing if none repeats."""
    unique = [name for name, _ in names.model.named_modules()]
    stacks = [stack for stack in (_stack_at(names, path) for path in unique) if stack]
    kinds: dict[type[nn.Module], list[_Stack]] = {}
    for stack in stacks:
        kinds.setdefault(stack.kind, []).append(stack)
    main: list[_Stack] = []
    most = 0
    for group in kinds.values():  # in registration order, so that of two that hold the same the outer one wins
        alike = sum(type(names.modules[block]) is group[0].kind for stack in group for block in stack.blocks)
        held = sum(names.num_inside.get(block, 0) for stack in group for block in stack.blocks)
        if alike >= 2 and held > most:
            main, most = group, held
    main = [stack for stack in stacks if stack in main or any(_siblings(stack.path, other.path) for other in main)]
    found = tuple(block for stack in main for block in stack.blocks)
    # A block inside another block of the group is a part of it, not a block.
    found = tuple(block for block in found if not set(prefixes(block)) & set(found))
    return _opened(names, found) if found else ()


def blocks_of(names: Names) -> list[str]:
    if found := repeated(names):
        return list(found)
    owners = {name.rpartition(".")[0]: None for name in names.params}
    layers = [owner for owner in owners if not is_norm(names.modules[owner])]
    if len(layers) > 1:
        layers = [owner for owner in layers if owner != ""]  # loose parameters of the model itself: no layer
    return layers or list(owners)


def blocks(model: nn.Module) -> list[str]:
    """Name the blocks that ``@last:K`` counts, first to last.

    The blocks are the children of the ``ModuleList``, ``ModuleDict`` or ``Sequential`` of alike modules (two or more of
    one class, each built of modules itself) that holds the most parameters. Containers of the same class of modules
    (``layer1`` to ``layer4`` of a ResNet; ``encoder.block`` and ``decoder.block`` of a T5), and those at the same
    place of a sibling (``encoder.layers``, ``decoder.layers``), join them in order; stages of different width are
    opened into their blocks. Where nothing repeats, every module that owns parameters itself, norms aside, is a block.

    Assumes: modules are registered in the order they run.

    >>> blocks(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    ['0', '2']
    """
    return blocks_of(Names(model))


def num_blocks(model: nn.Module) -> int:
    """Count the blocks of :func:`blocks`: the largest ``K`` of ``@last:K``."""
    return len(blocks(model))
