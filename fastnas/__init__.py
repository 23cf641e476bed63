"""Neural architecture search by weight sharing, on fused kernels.

The public names below load on first use, so that ``import fastnas`` costs no more than ``import torch``.
"""

from __future__ import annotations

import importlib
from typing import Any

from fastnas import _interrupt

__version__ = "0.1.0"

_interrupt.wait_for_command()

_HOME = {
    "Backbone": "fastnas.engine.backbone",
    "backend": "fastnas._backends",
    "depthwise_bank": "fastnas.ops.depthwise_bank",
    "drop_path": "fastnas.ops.path_dropout",
    "export_network": "fastnas.export",
    "gumbel_softmax": "fastnas.ops.gumbel_softmax",
    "load_network": "fastnas.trained",
    "mixed_sum": "fastnas.ops.mixed_sum",
    "norm_mixed_sum": "fastnas.ops.norm_mixed_sum",
    "partial_shuffle": "fastnas.ops.partial_shuffle",
    "path_dropout": "fastnas.ops.path_dropout",
    "register_candidate": "fastnas.nn",
    "register_space": "fastnas.spaces",
    "retrain_network": "fastnas.api",
    "sample_channels": "fastnas.ops.partial_shuffle",
    "sample_path_mask": "fastnas.ops.path_dropout",
    "search_network": "fastnas.api",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastnas' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
