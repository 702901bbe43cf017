"""Amounts as a caller writes them: ``"24GiB"``, ``"2 TFLOP"``, ``"50 ms"``."""

from __future__ import annotations

import re
from collections.abc import Mapping

from frostline.errors import FrostlineError

_BYTES = {
    "b": 1,
    **{f"{prefix}ib": 1024 ** (power + 1) for power, prefix in enumerate("kmgtp")},
    **{f"{prefix}b": 1000 ** (power + 1) for power, prefix in enumerate("kmgtp")},
}


def parse_bytes(text: str | int, what: str = "memory") -> int:
    """How many bytes a text means; a number is bytes already.

    Args:
        text: such as ``"24GiB"`` (1024 x 1024 x 1024), ``"24 GB"`` (1000 x 1000 x 1000), ``"512MiB"``, ``"1000000B"``.
        what: what an error calls it.

    Raises:
        FrostlineError: it has no unit or one that is not known, or is not above 0.

    >>> parse_bytes("24GiB") == 24 * 1024**3, parse_bytes("1.5 kB"), parse_bytes(528)
    (True, 1500, 528)
    """
    if isinstance(text, bool) or not isinstance(text, (int, str)):
        raise FrostlineError(f"{what} must be a number of bytes or a text like '24GiB', got {text!r}")
    if isinstance(text, int):
        found = text
    else:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
        size = _BYTES.get(match[2].lower()) if match else None
        if match is None or size is None:
            hint = f" Did you mean {match[1]}{match[2]}iB?" if match and match[2].upper() in "KMGTP" else ""
            raise FrostlineError(
                f"{what} {text!r} cannot be read: write a number and B, KiB, MiB, GiB or TiB (or kB, MB, GB, TB).{hint}"
            )
        found = int(float(match[1]) * size)
    if found <= 0:
        raise FrostlineError(f"{what} must be above 0, got {text!r}")
    return found


_PREFIXES = {"": 1, **{prefix: 1000 ** (power + 1) for power, prefix in enumerate("kmgtpe")}}
_FLOPS = {f"{prefix}flop{plural}": size for prefix, size in _PREFIXES.items() for plural in ("", "s")}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


def parse_flops(text: str, what: str = "FLOPs") -> int:
    """How many FLOPs a text means.

    >>> parse_flops("2 TFLOP") == 2 * 10**12, parse_flops("1.5 kFLOPs"), parse_flops("676")
    (True, 1500, 676)
    """
    return int(_parse(text, what, {**_FLOPS, "": 1}, "a number and FLOP, kFLOP, MFLOP, GFLOP or TFLOP"))


def parse_seconds(text: str, what: str = "seconds") -> float:
    """How many seconds a text means.

    >>> parse_seconds("50 ms"), parse_seconds("1.5 s")
    (0.05, 1.5)
    """
    return _parse(text, what, _SECONDS, "a number and s, ms or us")


def parse_count(text: str, what: str = "count") -> int:
    """How many a text means.

    >>> parse_count("1.5M"), parse_count("10k"), parse_count("676")
    (1500000, 10000, 676)
    """
    return int(_parse(text, what, _PREFIXES, "a number, alone or with k, M or G"))


def _parse(text: str, what: str, units: Mapping[str, float], known: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)\s*([A-Za-z]*)", text.strip().replace(",", "").replace("_", ""))
    size = units.get(match[2].lower()) if match else None
    if match is None or size is None:
        raise FrostlineError(f"{what} {text!r} cannot be read: write {known}")
    return float(match[1]) * size
