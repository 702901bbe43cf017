"""What kind of thing a module or parameter is: a norm, an embedding, an original that peft keeps beside its copy."""

from __future__ import annotations

from torch import nn

from frostline.subsets.names import Names

_NORMS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,  # BatchNorm and InstanceNorm, lazy and synchronised ones too
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation.

    Torch's own are known by class. Any other module is one if its class's name holds ``Norm`` (or ends in ``norm``) and
    every parameter it owns itself is a scale, shift or vector: at most one dimension longer than 1.
    """
    if isinstance(module, _NORMS):
        return True
    name = type(module).__name__
    if "Norm" not in name and not name.lower().endswith("norm"):
        return False
    own = list(module.parameters(recurse=False))
    return bool(own) and all(sum(size > 1 for size in param.shape) <= 1 for param in own)


def is_embedding_module(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


def is_replaced(name: str, names: Names) -> bool:
    """Whether a parameter is the original that peft keeps beside the copy it trains (``modules_to_save``)."""
    outer, found, _ = name.partition(".original_module.")
    return bool(found) and f"{outer}.modules_to_save" in names.modules
