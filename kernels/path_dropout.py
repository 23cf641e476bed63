"""Triton kernels of ``path_dropout``: a sum over the paths that a sample's ghost batch keeps, and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnas.kernels._launch import accumulate_in, config, laid_out_as, launch


@triton.jit
def path_dropout_fwd_kernel(
    p_xs, p_mask, p_y, B, N, G, K: tl.constexpr, ACC: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr
):
    """``y[b, n] = sum_k mask[g(b), k] x_k[b, n]`` with ``g(b) = b G // B``, over the k with a non-zero mask.

    Grid: B / BB times N / BN programs. Tile: BB samples of BN elements. Of each x only the kept samples are read, once;
    y is written once: (kept share of K + 1) B N elements. Bound by memory bandwidth.
    """
    T = tl.cdiv(N, BN)
    i_b, i_n = tl.program_id(0) // T, tl.program_id(0) % T
    o_b = i_b.to(tl.int64) * BB + tl.arange(0, BB)
    o_n = i_n * BN + tl.arange(0, BN)
    m_b = o_b < B
    m = m_b[:, None] & (o_n < N)[None, :]
    p_scale = p_mask + (o_b * G // B) * K
    o = o_b[:, None] * N + o_n[None, :]
    b_y = tl.zeros((BB, BN), ACC)
    for k in tl.static_range(K):
        b_scale = tl.load(p_scale + k, mask=m_b, other=0).to(ACC)  # [BB]
        b_x = tl.load(p_xs[k] + o, mask=m & (b_scale != 0)[:, None], other=0.0).to(ACC)  # [BB, BN]
        b_y += b_scale[:, None] * b_x
    tl.store(p_y + o, b_y.to(p_y.dtype.element_ty), mask=m)


@triton.jit
def path_dropout_bwd_kernel(
    p_g, p_mask, p_dxs, B, N, G, K: tl.constexpr, ACC: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr
):
    """``dx_k[b, n] = mask[g(b), k] g[b, n]``, plain zero where the path was dropped.

    Grid and tile as forward. Reads g once, writes each dx once: (K + 1) B N elements. Bound by memory bandwidth.
    """
    T = tl.cdiv(N, BN)
    i_b, i_n = tl.program_id(0) // T, tl.program_id(0) % T
    o_b = i_b.to(tl.int64) * BB + tl.arange(0, BB)
    o_n = i_n * BN + tl.arange(0, BN)
    m_b = o_b < B
    m = m_b[:, None] & (o_n < N)[None, :]
    p_scale = p_mask + (o_b * G // B) * K
    o = o_b[:, None] * N + o_n[None, :]
    b_g = tl.load(p_g + o, mask=m, other=0.0).to(ACC)  # [BB, BN]
    for k in tl.static_range(K):
        b_scale = tl.load(p_scale + k, mask=m_b, other=0).to(ACC)[:, None]  # [BB, 1]
        b_dx = b_scale * tl.where(b_scale != 0, b_g, 0.0)  # 0 * inf would be NaN
        tl.store(p_dxs[k] + o, b_dx.to(p_g.dtype.element_ty), mask=m)


def _batch_outermost(dense: Tensor) -> bool:
    batch = dense.stride(0)
    return all(n == 1 or s <= batch for n, s in zip(dense.shape[1:], dense.stride()[1:], strict=True))


def _by_sample(like: Tensor) -> Tensor:
    """A fresh tensor to be walked sample by sample: ``empty_like``, or contiguous where the batch lies inside."""
    out = torch.empty_like(like)
    return out if _batch_outermost(out) else torch.empty_like(like, memory_format=torch.contiguous_format)


def _finished(out: Tensor, like: Tensor) -> Tensor:
    result = torch.empty_like(like)
    return out if _batch_outermost(result) else result.copy_(out)


def _launch(kernel: Any, tensors: tuple[Any, ...], name: str, y: Tensor, groups: int, paths: int) -> None:
    at = config(name, y)
    tile = at.pop("BLOCK")
    batch = y.shape[0]
    count = y.numel() // batch
    bn = min(tile, triton.next_power_of_2(count))
    bb = min(tile // bn, triton.next_power_of_2(batch))
    programs = triton.cdiv(batch, bb) * triton.cdiv(count, bn)
    _, acc = accumulate_in(y.dtype)
    launch(y.device, kernel, programs, *tensors, batch, count, groups, K=paths, ACC=acc, BB=bb, BN=bn, **at)


def _numbers(mask: Tensor) -> Tensor:
    """The mask [G, K] row by row, as something that a kernel can load."""
    mask = mask.contiguous()
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def path_dropout_fwd(xs: Sequence[Tensor], mask: Tensor) -> Tensor:
    """``y`` in the layout of ``empty_like(xs[0])``."""
    y = _by_sample(xs[0])
    if y.numel():
        tensors = (laid_out_as(y, xs), _numbers(mask), y)
        _launch(path_dropout_fwd_kernel, tensors, "path_dropout_fwd", y, mask.shape[0], len(xs))
    return _finished(y, xs[0])


def path_dropout_bwd(g: Tensor, mask: Tensor) -> list[Tensor]:
    """Gradients of all paths, in the layout of ``empty_like(g)``."""
    dxs = [_by_sample(g) for _ in range(mask.shape[1])]
    if g.numel() and dxs:
        tensors = (*laid_out_as(dxs[0], (g,)), _numbers(mask), tuple(dxs))
        _launch(path_dropout_bwd_kernel, tensors, "path_dropout_bwd", dxs[0], mask.shape[0], len(dxs))
    return [_finished(dx, g) for dx in dxs]
