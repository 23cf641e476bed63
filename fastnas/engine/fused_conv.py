"""ReLU, convolutions and batch normalisation of a derived network as one step each way, while it is trained.

The stages are those of the fused supernet, with the affine part of a derived network's normalisation:

    y = gamma r (z - mean) + beta,   dgamma = r D,   dbeta = S,   dz = gamma r (g - S / n - r^2 (z - mean) D / n)

with r = 1 / sqrt(var + eps), S = sum g and D = sum g (z - mean) over the n pixels of the batch. Only x and z are kept
for the backward pass: no ReLU output, no depthwise output, no normalised copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastnas.engine.running import follow
from fastnas.engine.stems import CifarStem, ImageNetStem
from fastnas.nn import DilConv, FactorizedReduce, ReLUConvBN, SepConv
from fastnas.ops.stages.conv_stage import conv_stage_bwd, conv_stage_fwd, unflatten
from fastnas.ops.stages.maps import images, maps
from fastnas.ops.stages.node_sum import node_dots, node_sum
from fastnas.ops.stages.norms import through_norms, with_deviation

FUSED_DTYPES = (torch.float32, torch.float64)
KERNELS = (3, 5)  # depthwise ones that conv_stage has


@dataclass(frozen=True)
class _Stage:
    """The modules of a stage; (depthwise or None, pointwise, shift of its pixels) of each part."""

    norm: nn.BatchNorm2d
    parts: tuple[tuple[nn.Conv2d | None, nn.Conv2d, int], ...]

    @property
    def stride(self) -> int:
        depthwise, pointwise, _ = self.parts[0]
        return (depthwise or pointwise).stride[0]

    def __call__(self, x: Tensor) -> Tensor:
        described, weights, first = [], [], 0
        for depthwise, pointwise, shift in self.parts:
            described += [0, 0, first, 1 if depthwise is None else depthwise.dilation[0], shift]
            weights += [x.new_empty(0) if depthwise is None else depthwise.weight, pointwise.weight]
            first += pointwise.out_channels
        norm = self.norm
        y, statistics = _ConvNorm.apply(described, self.stride, norm.eps, x, norm.weight, norm.bias, *weights)
        follow(norm, *statistics[0], y.numel() // y.shape[1])
        return y


class _ConvNorm(torch.autograd.Function):
    """x [B, C, H, W], gamma, beta [O], then the depthwise and the pointwise weight of each part -> y, statistics."""

    @staticmethod
    def forward(
        ctx: Any, parts: list[int], stride: int, eps: float, x: Tensor, gamma: Tensor, beta: Tensor, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        x = maps(x)
        z, statistics = conv_stage_fwd([x], None, parts, list(weights[0::2]), list(weights[1::2]), stride, True)
        norms = with_deviation(statistics, eps)
        y = beta.expand(z.shape[1:]).contiguous()
        node_sum(y, [z[0]], torch.stack([gamma * norms[0, 1], norms[0, 0]])[None], True)
        ctx.save_for_backward(x, z, norms, gamma, *weights)
        ctx.parts, ctx.stride = parts, stride
        ctx.mark_non_differentiable(statistics)
        return images(y), statistics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Any, ...]:
        x, z, norms, gamma, *weights = ctx.saved_tensors
        g = maps(g)
        dots = node_dots([g], [z[0]], norms[:, 0])
        coef = through_norms(norms, gamma, dots, z[0].numel() // z.shape[-1], True)
        needs_dx = ctx.needs_input_grad[3]
        dx, _, flat = conv_stage_bwd(
            [g], [z[0]], coef, [x], None, ctx.parts, weights[0::2], weights[1::2], ctx.stride, None, needs_dx, True
        )
        found = iter(unflatten(flat, [weight for weight in weights if weight.numel()]))
        gradients = [next(found) if weight.numel() else None for weight in weights]
        return None, None, None, images(dx[0]) if needs_dx else None, norms[0, 1] * dots[0, 1], dots[0, 0], *gradients


def _stages(module: nn.Module) -> list[_Stage]:
    """What a module is as stages, one after the other; none for a module that is nothing of the kind."""
    if isinstance(module, FactorizedReduce):
        return [_Stage(module.norm, ((None, module.conv_even, 0), (None, module.conv_odd, 1)))]
    if isinstance(module, ReLUConvBN):
        return [_Stage(module[2], ((None, module[1], 0),))]
    if isinstance(module, SepConv | DilConv) and module[1].kernel_size[0] in KERNELS:
        layers = list(module)
        halves = (layers[start : start + 4] for start in range(0, len(layers), 4))
        return [_Stage(norm, ((depthwise, pointwise, 0),)) for _, depthwise, pointwise, norm in halves]
    return []


def fuse_convolutions(network: nn.Module) -> None:
    """From now on the separable, dilated and 1x1 convolutions of a derived network are trained fused, its stem exactly.

    Parameters, buffers, names and results stay. Evaluation, other dtypes than float32 and float64, and autocast go on
    as before. Gradients can be taken once, not of gradients.
    """
    for module in network.modules():
        if stages := _stages(module):
            module.forward = partial(_forward, module, stages)
        elif isinstance(module, CifarStem | ImageNetStem):
            module.forward = partial(type(module).forward, module, exact=True)


def _forward(module: nn.Module, stages: list[_Stage], x: Tensor) -> Tensor:
    if not module.training or x.dtype not in FUSED_DTYPES or torch.is_autocast_enabled(x.device.type):
        return type(module).forward(module, x)
    for stage in stages:
        x = stage(x)
    return x
