"""Amounts as a caller writes them: ``"24GiB"``."""

from __future__ import annotations

import re

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
