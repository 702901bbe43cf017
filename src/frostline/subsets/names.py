"""A model's parameters and modules by name, ties and shared modules included."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from frostline.errors import SubsetError

_NAMING = {"named_parameters", "_named_members", "named_modules"}  # what a class overrides to name parameters its way


class Names:
    """A model's parameters and modules under every name they have, ties and shared modules included."""

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise SubsetError(f"the model is a {type(model).__name__}, not a torch.nn.Module.")
        self.model = model
        self._registered = _registered(model)
        self.params: dict[str, nn.Parameter] = {}
        self.canonical_of_id: dict[int, str] = {}
        for name, param in self._registered.items():
            if self.canonical_of_id.setdefault(id(param), name) == name:
                self.params[name] = param
        lazy = [name for name, param in self.params.items() if is_lazy(param)]
        if lazy:
            raise SubsetError(
                f"{lazy[0]!r} has no shape yet ({len(lazy)} lazy parameters in {type(model).__name__}). "
                "Run one forward first, so that lazy modules learn their shapes."
            )

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Every name of every parameter -> the canonical one, its first in ``model.named_parameters()``."""
        return {name: self.canonical_of_id[id(param)] for name, param in self._registered.items()}

    @cached_property
    def position(self) -> dict[str, int]:
        """Canonical name -> place in ``model.named_parameters()``."""
        return {name: at for at, name in enumerate(self.params)}

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Every name of every module; the model itself is ``""``."""
        return dict(self.model.named_modules(remove_duplicate=False))

    @cached_property
    def _aliases_in(self) -> dict[str, list[str]]:
        inside: dict[str, list[str]] = {}
        for alias in self.aliases:
            for prefix in prefixes(alias):
                inside.setdefault(prefix, []).append(alias)
        return inside

    @cached_property
    def num_inside(self) -> dict[str, int]:
        """Module name -> elements of the parameters first registered inside; a tie counts at its first place only."""
        count: dict[str, int] = {}
        for name, param in self.params.items():
            for prefix in prefixes(name):
                count[prefix] = count.get(prefix, 0) + param.numel()
        return count

    def aliases_in(self, module_name: str) -> list[str]:
        """Return every name, ties included, of the parameters inside a module."""
        return self._aliases_in.get(module_name, [])

    def params_of(self, module_name: str) -> list[str]:
        """Return the canonical names of the parameters inside a module, in the order of the model."""
        return self.canonical(self.aliases_in(module_name))

    def canonical(self, aliases: Iterable[str]) -> list[str]:
        """Return the parameters that these names stand for, each once, in the order of the model."""
        return sorted({self.aliases[alias] for alias in aliases}, key=self.position.__getitem__)

    def children_of(self, module_name: str) -> list[str]:
        """Return a module's child modules that hold parameters, in registration order."""
        children = (join(module_name, child) for child, _ in self.modules[module_name].named_children())
        return [child for child in children if self.aliases_in(child)]

    def name_of(self, module: nn.Module) -> str | None:
        """Return a module's first name by identity, or None if it is not inside the model."""
        return next((name for name, inside in self.modules.items() if inside is module), None)

    def owner_of(self, name: str) -> nn.Module:
        """Return the module that owns a parameter."""
        return self.modules[name.rpartition(".")[0]]

    def outline(self) -> list[str]:
        """Return the names a reader would look at first: the top modules, or the parameters of a single layer."""
        return self.children_of("") or list(self.params)

    def tie_note(self, aliases: Iterable[str]) -> str:
        """Say which of these names are ties to a parameter known by another name."""
        ties = [f"{alias} is tied to {self.aliases[alias]}" for alias in aliases if self.aliases[alias] != alias]
        return "; ".join(ties[:3]) + (f"; and {len(ties) - 3} more ties" if len(ties) > 3 else "")


def _registered(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what ``model.named_parameters(remove_duplicate=False)`` yields, in less than half of its time.

    Torch hands every name up through one generator a level. A model that holds a class with its own way of naming
    (FSDP, checkpoint wrappers, peft's attention) is asked itself.
    """
    found: dict[str, nn.Parameter] = {}
    kinds: set[type[nn.Module]] = set()
    _collect(model, "", found, kinds)
    torchs = all(getattr(kind, method) is getattr(nn.Module, method) for kind in kinds for method in _NAMING)
    if torchs and not _NAMING & vars(model).keys():
        return found
    return dict(model.named_parameters(remove_duplicate=False))


def _collect(module: nn.Module, prefix: str, found: dict[str, nn.Parameter], kinds: set[type[nn.Module]]) -> None:
    """Add the parameters of a module and those inside it, by name, and the classes met on the way."""
    kinds.add(type(module))
    if module._parameters:  # most modules own none, or have no children: asking first saves a tenth
        for name, param in module._parameters.items():
            if param is not None:
                found[prefix + name] = param
    if module._modules:
        for name, child in module._modules.items():
            if child is not None:
                _collect(child, f"{prefix}{name}.", found, kinds)


def prefixes(name: str) -> Iterator[str]:
    """Yield the names of every module around a parameter: ``a.b.weight`` gives ``""``, ``a``, ``a.b``."""
    yield ""
    at = name.find(".")
    while at != -1:
        yield name[:at]
        at = name.find(".", at + 1)


def join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def within(name: str, module_name: str) -> bool:
    """Whether a parameter or module is a module or inside it, by name."""
    return module_name == "" or name == module_name or name.startswith(module_name + ".")


def trains(param: torch.Tensor) -> bool:
    """Whether autograd can train it: floating or complex; integers, bools and quantised ones cannot."""
    return param.dtype.is_floating_point or param.dtype.is_complex


def listed(items: list[str], limit: int) -> str:
    """List a few and say how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
