"""Folded normalisations: what stands for BN(z), and what its gradient becomes."""

from __future__ import annotations

import torch
from torch import Tensor


def with_deviation(stats: Tensor, eps: float) -> Tensor:
    """Mean and variance [n, 2, C] -> mean and 1 / standard deviation."""
    return torch.stack([stats[:, 0], torch.rsqrt(stats[:, 1] + eps)], dim=1)


def through_norms(norms: Tensor, weights: Tensor | float, dots: Tensor, count: int, training: bool) -> Tensor:
    """Coefficients [n, 4, C] of conv_stage_bwd that turn the gradient of w BN(z) into that of z.

    norms, dots: [n, 2, C]; weights: w, [n, 1] or one number. Running statistics do not depend on z.
    """
    mean, rstd = norms.unbind(1)
    scale = weights * rstd
    if training:
        centre, offset = -scale * rstd**2 * dots[:, 1] / count, -scale * dots[:, 0] / count
    else:
        centre = offset = torch.zeros_like(scale)
    return torch.stack([scale, centre, offset, mean], dim=1)
