"""``path_dropout`` in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def path_dropout(xs: Sequence[Tensor], mask: Tensor) -> Tensor:
    """``y[b] = sum_k mask[g(b), k] * x_k[b]`` with ``g(b) = b * G // B``; see :func:`fastnas.path_dropout`."""
    batch, groups = xs[0].shape[0], mask.shape[0]
    group = torch.arange(batch, device=mask.device) * groups // max(batch, 1)
    scales = mask.detach()[group].to(xs[0].dtype)  # [B, K]
    y = torch.zeros_like(xs[0])
    for k, x in enumerate(xs):
        scale = scales[:, k].view(-1, *[1] * (x.dim() - 1))
        # where, because 0 * NaN would let a dropped path through.
        y = y + torch.where(scale != 0, scale * x, 0)
    return y
