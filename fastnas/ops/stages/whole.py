"""Whether the stages of a step run as one compiled call."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnas import _backends


def in_one_call(x: Tensor) -> bool:
    """Where compiled kernels serve all stages.

    Whoever watches ops (a profiler, or shapes alone) is shown each stage and what it allocates.
    """
    chosen = (_backends.choose(stem, x.device.type) for stem in ("conv_stage", "node_sum", "pool_stage"))
    return all(name == "native" for name in chosen) and not torch._C._len_torch_dispatch_stack()
