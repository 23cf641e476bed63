"""The drop-in ops. Importing this package defines their schemas and loads the compiled library if it is there."""

from __future__ import annotations

from fastnas import _backends
from fastnas.ops.depthwise_bank import depthwise_bank
from fastnas.ops.gumbel_softmax import gumbel_softmax
from fastnas.ops.mixed_sum import mixed_sum
from fastnas.ops.norm_mixed_sum import norm_mixed_sum
from fastnas.ops.partial_shuffle import partial_shuffle, sample_channels
from fastnas.ops.path_dropout import drop_path, path_dropout, sample_path_mask
from fastnas.ops.stages import (  # noqa: F401  defines the engine's ops
    conv_stage,
    node_sum,
    norm_stage,
    partial_join,
    pool_stage,
    source_stage,
)

_backends.bind_by_environment()

__all__ = [
    "depthwise_bank",
    "drop_path",
    "gumbel_softmax",
    "mixed_sum",
    "norm_mixed_sum",
    "partial_shuffle",
    "path_dropout",
    "sample_channels",
    "sample_path_mask",
]
