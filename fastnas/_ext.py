"""Loads the compiled library ``fastnas._C`` once and remembers why when it cannot."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

_INSTRUCTION_SETS = ("avx512", "avx2", "baseline")  # the best one first
_REBUILD = "build it with: pip install --no-build-isolation -e ."


def build_facts() -> dict[str, Any]:
    """What setup.py decided when this copy of fastnas was built; empty when it never was."""
    path = Path(__file__).with_name("_build.json")
    return json.loads(path.read_text()) if path.exists() else {}


def modules() -> list[str]:
    """The modules that make up the library here: the best of the instruction sets that PyTorch uses, then CUDA's part.

    PyTorch takes what the processor has, or what the environment variable ATEN_CPU_CAPABILITY allows it. Empty where
    nothing was built.
    """
    import torch

    used = torch.backends.cpu.get_cpu_capability().lower()
    at_best = _INSTRUCTION_SETS.index(used) if used in _INSTRUCTION_SETS else -1
    cpu = [name for name in _INSTRUCTION_SETS[at_best:] if _found(name)]
    return [f"fastnas._C.{name}" for name in cpu[:1] + ["cuda"] * _found("cuda")]


def _found(name: str) -> bool:
    return importlib.util.find_spec(f"fastnas._C.{name}") is not None


@functools.cache
def load() -> str | None:
    """Load the library; returns ``None`` on success, else warns and returns why it is not there."""
    names = modules()
    try:
        for name in names:
            importlib.import_module(name)
        if names:
            return None
        facts = build_facts()
        cause = facts.get("native_reason") if facts and not facts["native"] else "it was not built"
        reason = f"the compiled library fastnas._C is missing: {cause}"
    except ImportError as error:
        import torch

        built = build_facts().get("torch", "an unknown version")
        reason = f"{name} was built for torch {built} and does not load in {torch.__version__} ({error})"
    warnings.warn(f"{reason}; plain PyTorch runs instead, slower; {_REBUILD}", RuntimeWarning, stacklevel=2)
    return f"{reason}; {_REBUILD}"
