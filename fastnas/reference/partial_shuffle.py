"""``partial_shuffle`` in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnas.reference.mixed_sum import mixed_sum


def _pool(x: Tensor) -> Tensor:
    if x.shape[1] == 0:  # K = 1 leaves nothing to bypass, and max_pool2d refuses tensors without channels
        return x[:, :, ::2, ::2]
    return F.max_pool2d(x, 2, 2, ceil_mode=True)


def partial_shuffle(
    mixed: Sequence[Tensor],
    weights: Tensor | None,
    bypass: Tensor,
    *,
    stride: int = 1,
    channels: Tensor | None = None,
) -> Tensor:
    """Mix, pool the bypass, concatenate, shuffle; see :func:`fastnas.ops.partial_shuffle`."""
    mix = mixed[0] if weights is None else mixed_sum(mixed, weights)
    rest = bypass if stride == 1 else _pool(bypass)
    if channels is not None:
        return rest.index_copy(1, channels, mix)
    joined = torch.cat([mix, rest], dim=1)  # [B, C, H', W']
    batch, total, height, width = joined.shape
    count = mix.shape[1]
    return joined.view(batch, total // count, count, height, width).transpose(1, 2).reshape(joined.shape)
