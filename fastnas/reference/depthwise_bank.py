"""``depthwise_bank`` in plain PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def depthwise_bank(
    x: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    *,
    stride: int = 1,
    relu: bool = True,
    max_pool: bool = False,
    avg_pool: bool = False,
) -> list[Tensor]:
    """One module after the other on the same input; see :func:`fastnas.depthwise_bank`."""
    with _without_autocast(x.device.type):
        h = F.relu(x) if relu else x
        ys = [_convolve(h, w, stride, d) for w, d in zip(weights, dilations, strict=True)]
        if max_pool:
            ys.append(F.max_pool2d(x, 3, stride, padding=1))
        if avg_pool:
            ys.append(F.avg_pool2d(x, 3, stride, padding=1, count_include_pad=False))
    return ys


def _convolve(h: Tensor, w: Tensor, stride: int, dilation: int) -> Tensor:
    padding = dilation * (w.shape[-1] // 2)
    dtype = torch.promote_types(h.dtype, w.dtype)
    y = F.conv2d(h.to(dtype), w.to(dtype), None, stride, padding, dilation, groups=h.shape[1])
    return y.to(h.dtype)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[object]:
    """Convolutions keep the dtype of their input; on the meta device there is no autocast."""
    return contextlib.nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)
