"""Max and average pooling (3x3) of a node, shared by all its outgoing edges, with their statistics."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnas import _backends
from fastnas.ops._library import accumulate_dtype, define


def _pools(x: Tensor, stride: int) -> list[Tensor]:
    x = x.permute(0, 3, 1, 2)
    pooled = [
        F.max_pool2d(x, 3, stride, padding=1),
        F.avg_pool2d(x, 3, stride, padding=1, count_include_pad=False),
    ]
    return [pool.permute(0, 2, 3, 1) for pool in pooled]


def _fwd_reference(x: Tensor, stride: int, statistics: bool) -> tuple[Tensor, Tensor]:
    pooled = torch.stack([pool.contiguous() for pool in _pools(x.to(accumulate_dtype(x.dtype)), stride)])
    stored = pooled.to(x.dtype)
    if not statistics:
        return stored, pooled.new_empty(0)
    variance, mean = torch.var_mean(pooled, dim=(1, 2, 3), correction=0)
    return stored, torch.stack([mean, variance], dim=1)


def _fwd_fake(x: Tensor, stride: int, statistics: bool) -> tuple[Tensor, Tensor]:
    batch, height, width, channels = x.shape
    pooled = x.new_empty(2, batch, -(-height // stride), -(-width // stride), channels)
    return pooled, x.new_empty((2, 2, channels) if statistics else 0, dtype=accumulate_dtype(x.dtype))


def _bwd_reference(
    x: Tensor, gs: list[Tensor], scales: Tensor, coef: Tensor, stride: int, base: Tensor | None
) -> Tensor:
    with torch.enable_grad():
        leaf = x.detach().to(coef.dtype).requires_grad_()
        pooled = _pools(leaf, stride)
        given = []
        for which, pool in enumerate(pooled):
            total = coef[which, 0] * (pool.detach() - coef[which, 2]) + coef[which, 1]
            given.append(total + sum(scale[which] * g for scale, g in zip(scales, gs, strict=True)))
        (dx,) = torch.autograd.grad(pooled, leaf, given)
    if stride == 1:
        dx = dx + sum(scale[2] * g for scale, g in zip(scales, gs, strict=True))
    return (dx if base is None else base + dx).to(x.dtype).contiguous()


_pool_stage_fwd = define(
    "pool_stage_fwd(Tensor x, int stride, bool statistics) -> (Tensor, Tensor)",
    reference=_fwd_reference,
    fake=_fwd_fake,
)
pool_stage_fwd = _backends.served("pool_stage", _pool_stage_fwd, _fwd_reference)
"""Max-pooled and average-pooled x (borders do not count), ``[2, B, H', W', C]``, and with `statistics` mean and biased
variance of both, ``[2, 2, C]``. x: a map ``[B, H, W, C]``; H' = ceil(H / stride).
"""

_pool_stage_bwd = define(
    "pool_stage_bwd(Tensor x, Tensor[] gs, Tensor scales, Tensor coef, int stride, Tensor? base) -> Tensor",
    reference=_bwd_reference,
    fake=lambda x, gs, scales, coef, stride, base: x.new_empty(x.shape),
)
pool_stage_bwd = _backends.served("pool_stage", _pool_stage_bwd, _bwd_reference)
"""What reaches x through both pools and, at stride 1, the identity, on top of `base` if given: ``[B, H, W, C]``.

The pools are computed again. The gradient that reaches pool p (0 max, 1 average) is
``sum_n scales[n, p] gs[n] + coef[p, 0] (pool - coef[p, 2]) + coef[p, 1]`` per channel; that of the identity is
``sum_n scales[n, 2] gs[n]``. Equal maxima: the first one of the window, row by row, takes it.
gs: maps ``[B, H', W', C]``; scales: ``[N, 3, C]``; coef: ``[2, 3, C]``; base: a map like x.
"""

_backends.register("pool_stage", "pool_stage_fwd", "pool_stage_bwd")
