"""``resolve``: anything that ``train=`` accepts becomes a :class:`Subset` of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn

from frostline.errors import SubsetError
from frostline.subsets.built_ins import BUILT_INS
from frostline.subsets.names import Names, listed, trains
from frostline.subsets.patterns import Found, find, split
from frostline.subsets.slices import TensorSlice, few, merged, spell_shape, union, whole_or
from frostline.subsets.subset import Match, Subset

_Predicate = Callable[[str, nn.Parameter], object]
_END = object()
_ACCEPTED = (
    "Pass a name or glob ('layer2', '*.bias'), a list of them, a built-in "
    f"({', '.join(BUILT_INS)}), a module, parameters, an optimizer, a predicate (name, parameter) -> bool, or a Subset."
)


def resolve(train: object, model: nn.Module) -> Subset:
    """Say which parameters of ``model`` train. The model is only read, never changed.

    Args:
        train: what trains, as one of

            - None or ``"@now"``: the parameters whose ``requires_grad`` is set now;
            - a name or glob of parameters or modules (``*`` crosses dots): ``"layer2"``, ``"*.bias"``,
              ``"encoder.layer.[01]"``; several parted by commas; a built-in of :data:`frostline.subsets.BUILT_INS`;
            - a parameter with a trailing slice: ``"embeddings.weight[30522:]"``, ``"fc1.weight[:, :128]"``. Only a
              trailing bracket that holds ``:`` or ``,`` is a slice; any other is a class of characters;
            - an ``nn.Module`` inside the model, Parameters of it, an Optimizer over them, a predicate
              ``(name, parameter) -> bool``, a Plan (anything with a ``subset``) or a Subset;
            - a list of any of these, read in order. A leading ``!`` takes away, and a list that starts with one
              begins from ``@all``.

        model: the model, with real, meta or fake parameters.

    Returns:
        The subset, by canonical names: a parameter that has several names (tied weights) is known by the first one in
        ``model.named_parameters()`` and can be asked for by any.

    Raises:
        SubsetError: something matches nothing, is not in this model, cannot train, or nothing is left to train.
    """
    resolver = _Resolver(Names(model))
    label = resolver.read(train)
    return resolver.subset(label)


class _Resolver:
    """Reads ``train=`` item by item, adding to what is chosen and taking away from it."""

    def __init__(self, names: Names) -> None:
        self.names = names
        self.chosen: dict[str, tuple[TensorSlice, ...] | None] = {}  # None: the whole parameter
        self.matched: list[Match] = []
        self.begun = False

    def read(self, train: object) -> str:
        """Read anything ``train=`` accepts and return its label."""
        names = self.names
        if train is None:
            return self.read("@now")
        if isinstance(train, str):
            return self._read_patterns(train)
        if isinstance(train, Subset):
            self._add(self._of_subset(train), train.matched)
            return str(train)
        if isinstance(getattr(train, "subset", None), Subset):  # a Plan
            check = getattr(train, "check_model", None)
            if check is not None:
                check({name: tuple(param.shape) for name, param in names.params.items()})
            return self.read(cast("Any", train).subset)
        if isinstance(train, nn.Module):
            return self._read_module(train)
        if isinstance(train, torch.Tensor):
            return self._read_tensors([train], "")
        if isinstance(train, torch.optim.Optimizer) or isinstance(getattr(train, "param_groups", None), list):
            held = [param for group in cast("Any", train).param_groups for param in group["params"]]
            return self._read_tensors(held, f"{type(train).__name__} optimizer")
        if isinstance(train, Mapping):
            raise SubsetError(f"train= is a {type(train).__name__}: pass one of its values. {_ACCEPTED}")
        if isinstance(train, Iterable):
            return self._read_items(list(train))
        if callable(train) and not isinstance(train, type):
            called = getattr(train, "__name__", type(train).__name__)
            label = "predicate" if called == "<lambda>" else f"predicate {called}"
            self._add(Found(label, dict.fromkeys(_asked(cast("_Predicate", train), names.params))))
            return label
        raise SubsetError(f"train= is {train!r}, which names no parameters. {_ACCEPTED}")

    def _read_patterns(self, text: str) -> str:
        patterns = split(text)
        if not patterns:
            raise SubsetError(f"train={text!r} holds no pattern. {_ACCEPTED}")
        for pattern in patterns:
            if not pattern.startswith("!"):
                self._add(find(self.names, pattern))
                continue
            if not self.begun:
                self._add(find(self.names, "@all"))
            self._take_away(find(self.names, pattern[1:].strip()))
        return text.strip()

    def _read_module(self, module: nn.Module) -> str:
        name = self.names.name_of(module)
        kind, model_kind = type(module).__name__, type(self.names.model).__name__
        if name is None:
            raise SubsetError(
                f"this {kind} is not a module of this {model_kind}. Modules are found by identity, so a copy "
                "is another module: pass its name instead."
            )
        inside = self.names.params_of(name)
        label = f"module {name}" if name else f"module {kind}"
        if not inside:
            raise SubsetError(f"{label} ({kind}) holds no parameters.")
        note = self.names.tie_note(self.names.aliases_in(name))
        self._add(Found(label, dict.fromkeys(inside), note))
        return label

    def _read_tensors(self, tensors: list[torch.Tensor], label: str) -> str:
        foreign = [tensor for tensor in tensors if id(tensor) not in self.names.canonical_of_id]
        kind = type(self.names.model).__name__
        if foreign:
            holder = f"the {label} holds" if label else "train= holds"
            alike = [name for name, param in self.names.params.items() if param.shape == foreign[0].shape]
            hint = f" ({alike[0]!r} has this shape)" if alike else ""
            raise SubsetError(
                f"{holder} {len(foreign)} tensors that are not parameters of this {kind}, the first of shape "
                f"{spell_shape(foreign[0].shape)}{hint}. Parameters are found by identity, so a copy is another "
                "parameter: pass names instead, or the model they belong to."
            )
        found = [self.names.canonical_of_id[id(tensor)] for tensor in tensors]
        if not label:
            label = found[0] if len(found) == 1 else f"{len(found)} parameters"
        if not found:
            raise SubsetError(f"{label}: there is nothing in it to train.")
        for name in found:
            if not trains(self.names.params[name]):
                raise self._cannot_train(label, [name])
        frozen = sum(not self.names.params[name].requires_grad for name in found)
        note = f"{frozen} of them frozen now" if frozen and label.endswith("optimizer") else ""
        ordered = sorted(found, key=self.names.position.__getitem__)
        self._add(Found(label, dict.fromkeys(ordered), note))
        return label

    def _read_items(self, items: list[object]) -> str:
        """Read a list. Neighbouring Parameters make one item; pairs of ``named_parameters()`` stand for theirs."""
        if not items:
            raise SubsetError(f"train= is empty: it would train nothing. {_ACCEPTED}")
        label = self._read_exact_names(items)
        if label is not None:
            return label
        labels: list[str] = []
        held: list[torch.Tensor] = []
        for item in [*items, _END]:
            if isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], torch.Tensor):
                item = item[1]
            if isinstance(item, torch.Tensor):
                held.append(item)
                continue
            if held:
                labels.append(self._read_tensors(held, ""))
                held = []
            if item is not _END:
                labels.append(self.read(item))
        return ",".join(labels)

    def _read_exact_names(self, items: list[object]) -> str | None:
        """Read a list of canonical names as the patterns they are, without searching for each; None for any other list.

        >>> model = nn.Linear(2, 2)
        >>> resolve(["bias", "weight"], model).matched == resolve("bias,weight", model).matched
        True
        """
        params = self.names.params
        exact = [item for item in items if type(item) is str and item in params]
        label = ",".join(exact)
        if len(exact) < len(items) or any(mark in label for mark in "@![]") or split(label) != exact:
            return None  # another kind of item, or a name that reads as something else in a pattern
        if not all(trains(params[name]) for name in exact):
            return None  # the pattern's own reading refuses it, and says why
        self.begun = True
        self.chosen.update(dict.fromkeys(exact))
        self.matched.extend(Match(name, (name,)) for name in exact)
        return label

    def _of_subset(self, subset: Subset) -> Found:
        """Check a subset, perhaps made for another model, against this one."""
        names = self.names
        kind = type(names.model).__name__
        missing = [name for name in subset.names if name not in names.aliases]
        if missing:
            raise SubsetError(
                f"the subset {str(subset)!r} holds {len(missing)} parameters that this {kind} does not have, the first "
                f"{missing[0]!r}. This model holds {listed(names.outline(), 4)}. Resolve the subset for this model."
            )
        parts: dict[str, tuple[TensorSlice, ...] | None] = {}
        for alias in subset.names:
            name = names.aliases[alias]
            shape = tuple(names.params[name].shape)
            pieces = subset.slices.get(alias)
            known = subset.shapes.get(alias, pieces[0].tensor_shape if pieces else shape)
            if tuple(known) != shape:
                raise SubsetError(
                    f"the subset {str(subset)!r} knows {alias!r} with shape {spell_shape(known)}, but in this {kind} "
                    f"it has shape {spell_shape(shape)}. Resolve it for this model."
                )
            parts[name] = union((), pieces) if pieces else None
        return Found(str(subset), parts)

    def _cannot_train(self, pattern: str, cannot: list[str]) -> SubsetError:
        dtype = self.names.params[cannot[0]].dtype
        rest = f", nor can {len(cannot) - 1} more that it matched" if len(cannot) > 1 else ""
        return SubsetError(
            f"{pattern!r} matched {cannot[0]!r}, which is {dtype} and cannot train{rest}: gradients need "
            "a floating-point or complex dtype. Choose other parameters, or train an adapter beside it."
        )

    def _add(self, found: Found, matched: tuple[Match, ...] = ()) -> None:
        """Add what an item stands for. ``matched`` is what it matched when it was first resolved, if it was."""
        cannot = [name for name in found.parts if not trains(self.names.params[name])]
        kept = {name: parts for name, parts in found.parts.items() if name not in cannot}
        if cannot and not kept:
            raise self._cannot_train(found.pattern, cannot)
        note = found.note
        if cannot:
            skipped = f"left out {listed(cannot, 2)}: {self.names.params[cannot[0]].dtype} cannot train"
            note = f"{note}; {skipped}" if note else skipped
        if not kept:
            raise SubsetError(_matched_nothing(found.pattern, self.names))
        self.begun = True
        for name, parts in kept.items():
            before = self.chosen.get(name, ())
            if parts is None or before is None:
                self.chosen[name] = None
                continue
            self.chosen[name] = whole_or(union(before, parts), name)
        self.matched.extend(matched or [Match(found.pattern, _spell(kept), note)])

    def _take_away(self, found: Found) -> None:
        if not found.parts:
            raise SubsetError(_matched_nothing(found.pattern, self.names))
        gone: dict[str, tuple[TensorSlice, ...] | None] = {}
        for name, parts in found.parts.items():
            if name not in self.chosen:
                continue
            gone[name] = parts
            before = self.chosen.pop(name)
            if parts is None:
                continue
            rest = list(before if before is not None else (TensorSlice.whole(self.names.params[name].shape),))
            for part in parts:
                rest = [piece for old in rest for piece in old.minus(part)]
            if rest:
                self.chosen[name] = few(merged(few(rest, name)), name)
        self.matched.append(Match(f"!{found.pattern}", _spell(gone), found.note))

    def subset(self, label: str) -> Subset:
        """Return what was chosen, in the order of the model."""
        if not self.chosen:
            raise SubsetError(f"train={label!r} leaves nothing to train: every parameter it matched was taken away.")
        ordered = [name for name in self.names.params if name in self.chosen]
        slices = {name: parts for name in ordered if (parts := self.chosen[name]) is not None}
        shapes = {name: tuple(self.names.params[name].shape) for name in ordered}
        return Subset(tuple(ordered), slices, label, tuple(self.matched), shapes)


def _asked(predicate: _Predicate, params: Mapping[str, nn.Parameter]) -> list[str]:
    """Ask a predicate about every parameter."""
    chosen: list[str] = []
    for name, param in params.items():
        try:
            if predicate(name, param):
                chosen.append(name)
        except Exception as error:
            error.add_note(f"raised by the predicate passed as train=, called with ({name!r}, parameter)")
            raise
    return chosen


def _matched_nothing(pattern: str, names: Names) -> str:
    """Say why a built-in or predicate is empty, and what to do."""
    kind = type(names.model).__name__
    if not names.params:
        return f"{pattern}: {kind} has no parameters, so there is nothing to train."
    if pattern == "@now":
        return (
            f"@now: no parameter of {kind} requires grad now, so nothing would train. "
            "Say what trains, as in train='@head', or call requires_grad_(True) first."
        )
    return f"{pattern} matches none of the {len(names.params)} parameters of {kind}. Try '@all', or name some."


def _spell(parts: Mapping[str, tuple[TensorSlice, ...] | None]) -> tuple[str, ...]:
    return tuple(f"{name}{piece}" for name, pieces in parts.items() for piece in (pieces or ("",)))
