"""The subsets that have a name of their own: ``@now``, ``@all``, ``@head``, ``@biases``, ``@norms``, ``@last:K``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from frostline.errors import SubsetError
from frostline.subsets.head import head_aliases
from frostline.subsets.kinds import is_embedding_module, is_norm, is_replaced
from frostline.subsets.names import Names, join, listed, prefixes, trains
from frostline.subsets.stacks import blocks_of

BUILT_INS: Mapping[str, str] = {
    "@now": "the parameters whose requires_grad is set now",
    "@all": "every floating-point or complex parameter",
    "@head": "the last module, the one that turns features into outputs",
    "@biases": "parameters of at most one dimension whose own name has the word 'bias'",
    "@norms": "the parameters that normalisation modules own",
    "@last:K": "the last K blocks and everything registered after them",
}
"""The built-in subsets, and what each of them means."""


def built_in(names: Names, pattern: str) -> tuple[list[str], str]:
    """Resolve ``@name`` to canonical names and a note."""
    word, colon, argument = pattern.partition(":")
    if word == "@last" and colon:
        return _last(names, argument.strip())
    if pattern == "@now":
        return [name for name, param in names.params.items() if param.requires_grad], ""
    if pattern == "@all":
        return [name for name, param in names.params.items() if trains(param)], ""
    if pattern == "@biases":
        return _biases(names), ""
    if pattern == "@norms":
        return _norms(names), ""
    if pattern == "@head":
        inside = head_aliases(names)
        return names.canonical(inside), names.tie_note(inside)
    close = difflib.get_close_matches(word, [known.partition(":")[0] for known in BUILT_INS], 1, 0.5)
    hint = f" Did you mean {close[0]}{':K' if close[0] == '@last' else ''}?" if close else ""
    meanings = "; ".join(f"{known}: {meaning}" for known, meaning in BUILT_INS.items())
    raise SubsetError(f"no built-in subset is called {pattern!r}.{hint} Built in are {meanings}.")


def _biases(names: Names) -> list[str]:
    """``@biases``: parameters of at most one dimension with the word ``bias`` in their own name.

    Words are parted by ``_``, and a name ending in ``bias`` counts too: ``bias``, ``in_proj_bias``, ``bias_ih_l0``,
    ``q_bias``. A ``bias_k`` of shape ``[1, 1, E]`` or a table of position biases has more dimensions and is left out.
    """
    return [
        name
        for name, param in names.params.items()
        if param.dim() <= 1 and ("bias" in _own_name(name).split("_") or _own_name(name).endswith("bias"))
    ]


def _own_name(name: str) -> str:
    """Return a parameter's own name; ``fc.parametrizations.bias.original0`` is still ``bias``."""
    parts = name.split(".")
    if "parametrizations" in parts[:-2]:
        return parts[parts.index("parametrizations") + 1]
    return parts[-1]


def _norms(names: Names) -> list[str]:
    """``@norms``: the parameters that normalisation modules (see :func:`is_norm`) own themselves."""
    owned: set[str] = set()
    for prefix, module in names.modules.items():
        if is_norm(module):
            own = (join(prefix, name) for name, _ in module.named_parameters(recurse=False, remove_duplicate=False))
            owned.update(names.aliases[name] for name in own)
    return sorted(owned, key=names.position.__getitem__)


def _last(names: Names, text: str) -> tuple[list[str], str]:
    """``@last:K``: the last K blocks, everything registered after them, and ``@head``.

    Left out, and noted: embeddings registered after the first of these blocks but outside of the blocks (they run
    before), and head parameters tied to one registered before (an ``lm_head`` tied to the embedding): training either
    would take backward through the whole network.
    """
    found = blocks_of(names)
    if not re.fullmatch(r"\d+", text) or int(text) < 1:
        raise SubsetError(f"'@last:{text}': K must be a whole number from 1 to {len(found)}. Write '@last:1'.")
    if int(text) > len(found):
        raise SubsetError(
            f"'@last:{text}': {type(names.model).__name__} has {len(found)} blocks "
            f"({listed(found, 3)}). Write '@last:{len(found)}' or less, or '@all'."
        )
    chosen = found[-int(text) :]
    start = min(at for name, at in names.position.items() if not set(prefixes(name)).isdisjoint(chosen))
    taken: set[str] = set()
    left_out: dict[str, str] = {}
    for name in list(names.params)[start:]:
        if is_replaced(name, names):
            continue
        if set(prefixes(name)).isdisjoint(found) and _is_embedding(names, name):
            left_out[name] = f"{name} is left out: an embedding"
        else:
            taken.add(name)
    for alias in head_aliases(names):
        name = names.aliases[alias]
        if alias != name and names.position[name] < start:
            left_out[name] = f"{alias} is left out: tied to {name}, registered before these blocks"
        else:
            taken.add(name)
            left_out.pop(name, None)
    return sorted(taken, key=names.position.__getitem__), "; ".join(left_out.values())


def _is_embedding(names: Names, name: str) -> bool:
    """Whether a parameter belongs to an embedding, by class or by a module name with ``embed`` in it."""
    if is_embedding_module(names.owner_of(name)):
        return True
    return any("embed" in part.lower() for part in name.split("."))
