"""Loads the compiled library ``fastnas._C`` once and remembers why when it cannot."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

_REBUILD = "build it with: pip install --no-build-isolation -e ."


def build_facts() -> dict[str, Any]:
    """What setup.py decided when this copy of fastnas was built; empty when it never was."""
    path = Path(__file__).with_name("_build.json")
    return json.loads(path.read_text()) if path.exists() else {}


@functools.cache
def load() -> str | None:
    """Load the library; returns ``None`` on success, else warns and returns why it is not there."""
    if importlib.util.find_spec("fastnas._C") is None:
        facts = build_facts()
        cause = facts.get("native_reason") if facts and not facts["native"] else "it was not built"
        reason = f"the compiled library fastnas._C is missing: {cause}"
    else:
        try:
            importlib.import_module("fastnas._C")
            return None
        except ImportError as error:
            import torch

            built = build_facts().get("torch", "an unknown version")
            reason = f"fastnas._C was built for torch {built} and does not load in {torch.__version__} ({error})"
    warnings.warn(f"{reason}; plain PyTorch runs instead, slower; {_REBUILD}", RuntimeWarning, stacklevel=2)
    return f"{reason}; {_REBUILD}"
