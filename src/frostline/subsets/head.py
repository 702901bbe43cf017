"""``@head``: the module that turns features into outputs."""

from __future__ import annotations

from torch import nn

from frostline.subsets.kinds import is_embedding_module, is_replaced
from frostline.subsets.names import Names, prefixes, within
from frostline.subsets.stacks import repeated


def _declared_head(names: Names, module_name: str) -> str | None:
    """Return the head a module declares: ``get_output_embeddings()`` (transformers), ``get_classifier()`` (timm)."""
    for method in ("get_output_embeddings", "get_classifier"):
        declare = getattr(names.modules[module_name], method, None)
        if not callable(declare):
            continue
        try:
            head = declare()
        except (AttributeError, NotImplementedError, TypeError):  # declared by a base class for its other children
            continue
        found = names.name_of(head) if isinstance(head, nn.Module) else None
        if found is not None and names.aliases_in(found):
            return found
    return None


def _head(names: Names) -> str:
    """``@head``: the name of the last module, the one that turns features into outputs.

    From the model, go to the last registered child that holds parameters and is no ``nn.Embedding``. Go on into it as
    long as it is a body rather than a head: it does no more than wrap one such child, or it holds more than half of the
    model's parameters (a tied parameter counts where it is first registered), or it holds the repeated blocks of
    :func:`~frostline.subsets.stacks.blocks`. A head that the model declares (``get_output_embeddings()`` or
    ``get_classifier()``) wins where it lies outside the module found so.

    Assumes: modules are registered in the order they run. A model with several heads gives the last of them.
    """
    total = names.num_inside.get("", 0)
    bodies = {prefix for block in repeated(names) for prefix in prefixes(block)}
    declared = None
    at = ""
    while children := names.children_of(at):
        declared = declared or _declared_head(names, at)
        owns_some = any(True for _ in names.modules[at].parameters(recurse=False))
        wraps_one = len(children) == 1 and not owns_some
        if at != "" and at not in bodies and not wraps_one and 2 * names.num_inside.get(at, 0) <= total:
            break
        at = next(
            (child for child in reversed(children) if not is_embedding_module(names.modules[child])), children[-1]
        )
    if declared is not None and not within(declared, at):
        return declared
    return at


def head_aliases(names: Names) -> list[str]:
    """Return every name of the parameters that ``@head`` trains."""
    return [alias for alias in names.aliases_in(_head(names)) if not is_replaced(alias, names)]
