"""Sizes in bytes as people write them."""

from __future__ import annotations

import re

from fastnas.errors import UserError

_UNITS = {"": 1, "B": 1} | {
    letter + suffix: base**power
    for power, letter in enumerate("KMGT", 1)
    for suffix, base in (("B", 1000), ("iB", 1024), ("", 1024))
}


def parse_size(text: str) -> int:
    """``"12GiB"`` or ``"12 GB"`` (10^9 each) as bytes. Raises UserError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {name.lower(): size for name, size in _UNITS.items()}
    if found is None or found[2].lower() not in units:
        raise UserError(f"a size must be a number with a unit such as 12GiB or 12GB, got {text!r}")
    return int(float(found[1]) * units[found[2].lower()])


def format_size(size: float) -> str:
    """``"8.03 GB"``: three digits, with 1 GB = 10^9 bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 999.5 or unit == "GB":
            break
        size /= 1000
    digits = 0 if unit == "B" or abs(size) >= 99.95 else 1 if abs(size) >= 9.995 else 2
    return f"{size:.{digits}f} {unit}"
