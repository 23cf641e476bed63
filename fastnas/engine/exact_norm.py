"""Batch normalisation in channels_last whose statistics stay exact.

PyTorch's own adds up all pixels of a thread in float32 there, and loses a digit at 64 images of 32x32. With
r = 1 / sqrt(var + eps), S = sum g and D = sum g (x - mean) over the n pixels of the batch:

    y = gamma r (x - mean) + beta,   dgamma = r D,   dbeta = S,   dx = gamma r (g - S / n - r^2 (x - mean) D / n)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastnas.engine.running import follow
from fastnas.ops.stages.maps import images, maps
from fastnas.ops.stages.node_sum import node_dots, node_sum

EXACT_DTYPES = (torch.float32, torch.float64)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of a map."""
    count = x.numel() // x.shape[-1]
    mean = node_dots([x], [x], x.new_zeros(1, x.shape[-1]))[0, 0] / count
    return mean, (node_dots([x], [x], mean[None])[0, 1] / count).clamp_(min=0)


class _ExactNorm(torch.autograd.Function):
    """x [B, C, H, W], gamma, beta [C] -> y, mean and biased variance [C]."""

    @staticmethod
    def forward(ctx: Any, eps: float, x: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = maps(x)
        mean, variance = _statistics(x)
        rstd = (variance + eps).rsqrt()
        y = torch.empty_like(x).copy_(beta)  # made from x, which may be fake where weights are not
        node_sum(y, [x], torch.stack([gamma * rstd, mean])[None], True)
        ctx.save_for_backward(x, gamma, mean, rstd)
        ctx.mark_non_differentiable(mean, variance)
        return images(y), mean, variance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Any, ...]:
        x, gamma, mean, rstd = ctx.saved_tensors
        g, count = maps(g), x.numel() // x.shape[-1]
        dbeta, products = node_dots([g], [x], mean[None])[0]
        scale, dx = gamma * rstd, None
        if ctx.needs_input_grad[1]:
            dx = torch.empty_like(x)
            through_x = torch.stack([-scale * rstd**2 * products / count, mean])
            node_sum(dx, [g, x], torch.stack([torch.stack([scale, dbeta / count]), through_x]), False)
            dx = images(dx)
        return None, dx, rstd * products, dbeta


def exact_norm(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """`norm(x)` for x [B, C, H, W], with its running statistics; differentiable once.

    Exact where it matters: in training, on the CPU, in channels_last, float32 and float64. Anything else is left to the
    module.
    """
    drifts = x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last)
    if not (norm.training and drifts) or x.dtype not in EXACT_DTYPES or torch.is_autocast_enabled("cpu"):
        return norm(x)
    y, mean, variance = _ExactNorm.apply(norm.eps, x, norm.weight, norm.bias)
    follow(norm, mean, variance, y.numel() // y.shape[1])
    return y
