"""The layout of what the ops on ``[B, C, H, W]`` maps write: channels last, or contiguous."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(like: Tensor) -> bool:
    """Whether results that follow ``like`` are in channels last; csrc/common/results.h has the same rule."""
    return like.stride(1) == 1 and like.stride(3) > 1


def memory_format(like: Tensor) -> torch.memory_format:
    """The layout of results that follow ``like``."""
    return torch.channels_last if is_channels_last(like) else torch.contiguous_format


def empty_map(like: Tensor, *shape: int) -> Tensor:
    """A fresh map of that shape in the layout of ``like``."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format(like))


def map_in_layout_of(value: Tensor, like: Tensor) -> Tensor:
    """``value`` as a fresh map in the layout of ``like``."""
    return empty_map(like, *value.shape).copy_(value)
