"""Partial channels (PC-DARTS): a node's mixed channels joined with those that bypassed the candidates, shuffled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnas import _backends
from fastnas.ops._library import accumulate_dtype, define


def _pooled(x: Tensor, stride: int) -> Tensor:
    """2x2 max-pooled, rounding up, where the edge has stride 2."""
    if stride == 1:
        return x
    return F.max_pool2d(x.permute(0, 3, 1, 2), 2, 2, ceil_mode=True).permute(0, 2, 3, 1)


def _shuffle(x: Tensor, k: int) -> Tensor:
    """Channel g C/K + i becomes channel i K + g."""
    return x.unflatten(-1, (k, -1)).transpose(-1, -2).flatten(-2)


def _unshuffle(x: Tensor, k: int) -> Tensor:
    return x.unflatten(-1, (-1, k)).transpose(-1, -2).flatten(-2)


def _join_reference(out: Tensor, mixed: Tensor, xs: list[Tensor], strides: list[int], betas: Tensor, k: int) -> None:
    selected = mixed.shape[-1]
    dtype = betas.dtype
    bypass = sum(
        beta * _pooled(x[..., selected:].to(dtype), stride) for beta, x, stride in zip(betas, xs, strides, strict=True)
    )
    out.copy_(_shuffle(torch.cat([mixed.to(dtype), bypass], dim=-1), k))


def _bwd_reference(g: Tensor, xs: list[Tensor], strides: list[int], k: int) -> tuple[Tensor, Tensor]:
    g = _unshuffle(g, k)
    selected, dtype = g.shape[-1] // k, accumulate_dtype(g.dtype)
    bypassed = g[..., selected:].to(dtype)
    dots = [(bypassed * _pooled(x[..., selected:], stride)).sum() for x, stride in zip(xs, strides, strict=True)]
    return g[..., :selected].contiguous(), torch.stack(dots) if dots else g.new_empty(0, dtype=dtype)


def _dx_reference(
    x: Tensor, gs: list[Tensor], betas: Tensor, stride: int, k: int, mixed: Tensor, base: Tensor | None
) -> Tensor:
    selected = x.shape[-1] // k
    total = sum(beta * _unshuffle(g.to(betas.dtype), k)[..., selected:] for beta, g in zip(betas, gs, strict=True))
    with torch.enable_grad():
        leaf = x[..., selected:].detach().to(betas.dtype).requires_grad_()
        (bypass,) = torch.autograd.grad(_pooled(leaf, stride), leaf, total)
    dx = torch.cat([mixed.to(betas.dtype), bypass], dim=-1)
    return (dx if base is None else dx + base).to(x.dtype)


_partial_join = define(
    "partial_join(Tensor(a!) out, Tensor mixed, Tensor[] xs, int[] strides, Tensor betas, int k) -> ()",
    reference=_join_reference,
    fake=lambda out, mixed, xs, strides, betas, k: None,
)
partial_join = _backends.served("partial_join", _partial_join, _join_reference)
"""``out = shuffle(cat(mixed, sum_n betas[n] x_n[C/K:]))``: a node of PC-DARTS (eq. 1 and 2), its edges summed.

Channel g C/K + i of the concatenation becomes channel i K + g. Where ``strides[n]`` is 2, x_n is 2x2 max-pooled.
out: map ``[B, H, W, C]``; mixed: ``[B, H, W, C/K]``; xs: maps ``[B, H strides[n], W strides[n], C]``; betas: ``[N]``.
"""

_partial_join_bwd = define(
    "partial_join_bwd(Tensor g, Tensor[] xs, int[] strides, int k) -> (Tensor, Tensor)",
    reference=_bwd_reference,
    fake=lambda g, xs, strides, k: (
        g.new_empty(*g.shape[:3], g.shape[3] // k),
        g.new_empty(len(xs), dtype=accumulate_dtype(g.dtype)),
    ),
)
partial_join_bwd = _backends.served("partial_join", _partial_join_bwd, _bwd_reference)
"""Gradients of a node's mixed channels, ``[B, H, W, C/K]``, and of its betas, ``[N]``, from the node's own g; xs may be
empty where the betas need none.
"""

_partial_join_dx = define(
    "partial_join_dx(Tensor x, Tensor[] gs, Tensor betas, int stride, int k, Tensor mixed, Tensor? base) -> Tensor",
    reference=_dx_reference,
    fake=lambda x, gs, betas, stride, k, mixed, base: x.new_empty(x.shape),
)
partial_join_dx = _backends.served("partial_join", _partial_join_dx, _dx_reference)
"""Gradient of a source state x, ``[B, H, W, C]``: `mixed` on its first C/K channels, what the nodes with gradients gs
send back along the bypass on the others, plus `base`.
"""

_backends.register("partial_join", "partial_join", "partial_join_bwd", "partial_join_dx")
