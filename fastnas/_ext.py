"""Loads the parts of the compiled library ``fastnas._C`` once and remembers why when it cannot."""

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


def modules() -> dict[str, str]:
    """The library's modules here by device type: the best of the instruction sets that PyTorch uses, and CUDA's part.

    PyTorch takes what the processor has, or what the environment variable ATEN_CPU_CAPABILITY allows it. Empty where
    nothing was built.
    """
    import torch

    used = torch.backends.cpu.get_cpu_capability().lower()
    at_best = _INSTRUCTION_SETS.index(used) if used in _INSTRUCTION_SETS else -1
    candidates = {"cpu": _INSTRUCTION_SETS[at_best:], "cuda": ("cuda",)}
    found = {device: next(filter(_found, names), None) for device, names in candidates.items()}
    return {device: f"fastnas._C.{name}" for device, name in found.items() if name}


def _found(name: str) -> bool:
    return importlib.util.find_spec(f"fastnas._C.{name}") is not None


@functools.cache
def load(device_type: str) -> str | None:
    """Load the kernels for ``"cpu"`` or ``"cuda"``; returns ``None`` on success, else why they are not there.

    Without those for the CPU plain PyTorch runs, which a warning says; without those for CUDA Triton's do.
    """
    reason = _problem(device_type)
    if reason and device_type == "cpu":
        warnings.warn(f"{reason}; plain PyTorch runs instead, slower; {_REBUILD}", RuntimeWarning, stacklevel=2)
    return reason and f"{reason}; {_REBUILD}"


def _problem(device_type: str) -> str | None:
    facts, name = build_facts(), modules().get(device_type)
    if name is None:
        part, what = {"cpu": ("native", "is missing"), "cuda": ("cuda", "was built without CUDA")}[device_type]
        cause = facts[f"{part}_reason"] if facts and not facts[part] else "it was not built"
        return f"the compiled library fastnas._C {what}: {cause}"
    try:
        importlib.import_module(name)
    except ImportError as error:
        import torch

        built = facts.get("torch", "an unknown version")
        return f"{name} was built for torch {built} and does not load in {torch.__version__} ({error})"
    return None
