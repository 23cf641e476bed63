"""Text of the HTML report: escaped, and numbers as people read them."""

from __future__ import annotations

import html
import re
from typing import Any

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def clean(value: Any) -> str:
    """Any value as text that HTML shows literally, in elements and in quoted attributes."""
    return html.escape(_CONTROL.sub("\ufffd", str(value)), quote=True)


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def short(candidate: str) -> str:
    """``sep_conv_3x3`` -> ``sep 3x3``."""
    name = "skip" if candidate == "skip_connect" else re.sub("_(conv|pool)_", " ", candidate).replace("_", " ")
    return name if len(name) <= 16 else name[:15] + "…"


def duration(seconds: float) -> str:
    """``95`` -> ``1 min 35 s``."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
