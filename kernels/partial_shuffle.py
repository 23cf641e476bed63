"""Triton kernels of ``partial_shuffle``: mix some channels, pool or pass the others, and shuffle, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnas._layout import empty_map
from fastnas.kernels._launch import accumulate_in, config, launch, ordered_sum, planes, tile, walkable
from fastnas.kernels._maps import image_tile, pixels, takes_over


@triton.jit
def _places(o_c, p_channels, M, C, SUBSET: tl.constexpr, BM: tl.constexpr):
    """For channels ``o_c`` [BC] of the result: whether they are mixed, which mixed channel, which bypassed one.

    Without a subset, channel c = j (C / M) + g is channel g M + j of mixed and bypass laid end to end.
    """
    if SUBSET:
        o_m = tl.arange(0, BM)
        b_at = tl.load(p_channels + o_m, mask=o_m < M, other=-1)  # [BM]
        hit = o_c[:, None] == b_at[None, :]  # [BC, BM]
        return tl.sum(hit.to(tl.int32), 1) > 0, tl.sum(tl.where(hit, o_m[None, :], 0), 1).to(tl.int64), o_c
    else:
        groups = C // M
        j, g = o_c // groups, o_c % groups
        return g == 0, j, (g - 1) * M + j


@triton.jit
def partial_shuffle_fwd_kernel(
    p_mixed,
    p_w,
    p_bypass,
    p_channels,
    p_y,
    C,
    M,
    P,
    WY,
    H,
    W,
    mixed_b,
    mixed_c,
    mixed_p,
    bypass_b,
    bypass_c,
    bypass_h,
    bypass_w,
    y_b,
    y_c,
    y_p,
    K: tl.constexpr,
    SUBSET: tl.constexpr,
    POOL: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
):
    """``y[b, place(j)] = sum_k w[k] mixed_k[b, j]`` and ``y[b, place(c)] = pool(bypass)[b, c]``.

    Grid: B times C / BC times P / BP programs. Tile: BC channels by BP pixels of the result, one image; P = H' W'
    pixels in rows of WY. Reads each mixed tensor and the bypass once, writes y once: (K M + C - M + C) B P elements,
    and 3 (C - M) B P more when the bypass is pooled. Bound by memory bandwidth. Strides make the layout.
    """
    i_b, o_c, o_p, m = image_tile(C, P, BC, BP)
    is_mixed, o_j, o_s = _places(o_c, p_channels, M, C, SUBSET, BM)
    m_mixed, m_bypass = m & is_mixed[:, None], m & (~is_mixed)[:, None]

    o_mixed = i_b * mixed_b + o_j[:, None] * mixed_c + o_p[None, :] * mixed_p
    b_y = tl.zeros((BC, BP), ACC)
    for k in tl.static_range(K):
        b_x = tl.load(p_mixed[k] + o_mixed, mask=m_mixed, other=0.0).to(ACC)  # [BC, BP]
        if p_w is None:
            b_y += b_x
        else:
            b_y += tl.load(p_w + k).to(ACC) * b_x

    o_h, o_w = o_p // WY, o_p % WY
    p_x = p_bypass + i_b * bypass_b + o_s[:, None] * bypass_c  # [BC, 1]
    if POOL:
        b_x = pixels(p_x, 2 * o_h, 2 * o_w, H, W, bypass_h, bypass_w, m_bypass, float("-inf"), ACC)
        for q in tl.static_range(1, 4):
            h, w = 2 * o_h + q // 2, 2 * o_w + q % 2
            b_at = pixels(p_x, h, w, H, W, bypass_h, bypass_w, m_bypass, float("-inf"), ACC)
            b_x = tl.where(takes_over(b_at, b_x), b_at, b_x)
    else:
        o_x = o_h.to(tl.int64) * bypass_h + o_w * bypass_w
        b_x = tl.load(p_x + o_x[None, :], mask=m_bypass, other=0.0).to(ACC)
    b_y = tl.where(is_mixed[:, None], b_y, b_x)
    o_y = i_b * y_b + o_c[:, None] * y_c + o_p[None, :] * y_p
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=m)


@triton.jit
def partial_shuffle_bwd_kernel(
    p_g,
    p_mixed,
    p_w,
    p_bypass,
    p_channels,
    p_dmixed,
    p_dbypass,
    p_parts,
    C,
    M,
    P,
    WY,
    H,
    W,
    g_b,
    g_c,
    g_p,
    mixed_b,
    mixed_c,
    mixed_p,
    dmixed_b,
    dmixed_c,
    dmixed_p,
    bypass_b,
    bypass_c,
    bypass_h,
    bypass_w,
    dbypass_b,
    dbypass_c,
    dbypass_h,
    dbypass_w,
    K: tl.constexpr,
    SUBSET: tl.constexpr,
    POOL: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
):
    """``dmixed_k[b, j] = w[k] g[b, place(j)]``, the parts of ``dw[k] = sum g mixed_k``, and the bypass's gradient.

    A pooled window gives its whole gradient to its maximum, the first of equals, the last NaN, as max_pool2d does; the
    maximum is found again. With a channel subset the bypass gets zero where the mixture took its place.

    Grid and tile as forward. Reads g once, and each mixed tensor where ``p_mixed`` is given; writes each gradient once:
    (C + 2 K M + C - M) B P elements, and when pooled 8 instead of 1 for each of the C - M. Bound by memory bandwidth.
    """
    i_b, o_c, o_p, m = image_tile(C, P, BC, BP)
    is_mixed, o_j, o_s = _places(o_c, p_channels, M, C, SUBSET, BM)
    m_mixed = m & is_mixed[:, None]
    b_g = tl.load(p_g + i_b * g_b + o_c[:, None] * g_c + o_p[None, :] * g_p, mask=m, other=0.0).to(ACC)  # [BC, BP]

    o_dmixed = i_b * dmixed_b + o_j[:, None] * dmixed_c + o_p[None, :] * dmixed_p
    for k in tl.static_range(K):
        b_dx = b_g
        if p_w is not None:
            b_dx = tl.load(p_w + k).to(ACC) * b_g
        tl.store(p_dmixed[k] + o_dmixed, b_dx.to(p_g.dtype.element_ty), mask=m_mixed)
        if p_mixed is not None:
            o_mixed = i_b * mixed_b + o_j[:, None] * mixed_c + o_p[None, :] * mixed_p
            b_x = tl.load(p_mixed[k] + o_mixed, mask=m_mixed, other=0.0).to(ACC)
            b_dot = tl.sum(tl.sum(tl.where(m_mixed, b_g * b_x, 0.0), 1), 0)
            tl.store(p_parts + k * tl.num_programs(0).to(tl.int64) + tl.program_id(0), b_dot)

    if p_dbypass is not None:
        m_bypass = m
        if SUBSET:
            b_g = tl.where(is_mixed[:, None], 0.0, b_g)
        else:
            m_bypass = m & (~is_mixed)[:, None]
        o_h, o_w = o_p // WY, o_p % WY
        p_dx = p_dbypass + i_b * dbypass_b + o_s[:, None] * dbypass_c  # [BC, 1]
        if POOL:
            p_x = p_bypass + i_b * bypass_b + o_s[:, None] * bypass_c
            b_best = pixels(p_x, 2 * o_h, 2 * o_w, H, W, bypass_h, bypass_w, m_bypass, float("-inf"), ACC)
            b_at = tl.zeros((BC, BP), tl.int32)
            for q in tl.static_range(1, 4):
                h, w = 2 * o_h + q // 2, 2 * o_w + q % 2
                b_x = pixels(p_x, h, w, H, W, bypass_h, bypass_w, m_bypass, float("-inf"), ACC)
                takes = takes_over(b_x, b_best)
                b_at = tl.where(takes, q, b_at)
                b_best = tl.where(takes, b_x, b_best)
            for q in tl.static_range(4):
                h, w = 2 * o_h + q // 2, 2 * o_w + q % 2
                o_x = h.to(tl.int64) * dbypass_h + w * dbypass_w
                inside = m_bypass & ((h < H) & (w < W))[None, :]
                b_dx = tl.where(b_at == q, b_g, 0.0)
                tl.store(p_dx + o_x[None, :], b_dx.to(p_g.dtype.element_ty), mask=inside)
        else:
            o_x = o_h.to(tl.int64) * dbypass_h + o_w * dbypass_w
            tl.store(p_dx + o_x[None, :], b_g.to(p_g.dtype.element_ty), mask=m_bypass)


def _tile(kernel: str, y: Tensor, mixed: int, subset: bool) -> tuple[int, dict[str, Any]]:
    """Programs and constants for a result like ``y``."""
    at = config(kernel, y)
    programs, bc, bp = tile(y, at.pop("BLOCK"))
    return programs, {"BM": triton.next_power_of_2(mixed) if subset else 1, "BC": bc, "BP": bp, **at}


def _pixels(t: Tensor) -> tuple[int, int, int]:
    """Width and strides (h, w) of the rows of ``t``; one long row where its pixels lie at one stride."""
    strides = planes(t)
    if strides is not None:
        return t.shape[2] * t.shape[3], 0, strides[2]
    return t.shape[3], t.stride(2), t.stride(3)


def partial_shuffle_fwd(
    mixed: Sequence[Tensor], weights: Tensor | None, bypass: Tensor, channels: Tensor | None, stride: int
) -> Tensor:
    """The result ``[B, C, H', W']`` in the layout of ``bypass``."""
    batch, count, height, width = mixed[0].shape
    total = bypass.shape[1] + (count if channels is None else 0)
    y = empty_map(bypass, batch, total, height, width)
    if y.numel() == 0:
        return y
    mixed, mixed_strides = walkable(mixed, bypass)
    programs, at = _tile("partial_shuffle_fwd", y, count, channels is not None)
    row, s_h, s_w = (width, bypass.stride(2), bypass.stride(3)) if stride == 2 else _pixels(bypass)
    _, acc = accumulate_in(y.dtype)
    launch(
        y.device,
        partial_shuffle_fwd_kernel,
        programs,
        mixed,
        None if weights is None else weights.contiguous(),
        bypass,
        None if channels is None else channels.contiguous(),
        y,
        total,
        count,
        height * width,
        row,
        *bypass.shape[2:],
        *mixed_strides,
        *bypass.stride()[:2],
        s_h,
        s_w,
        *planes(y),
        K=len(mixed),
        SUBSET=channels is not None,
        POOL=stride == 2,
        ACC=acc,
        **at,
    )
    return y


def _gradients(
    g: Tensor,
    mixed: Sequence[Tensor] | None,
    weights: Tensor | None,
    bypass: Tensor | None,
    channels: Tensor | None,
    count: int,
    bypass_grad: bool,
) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """Gradients of the mixed tensors, of the weights where ``mixed`` is given, and of the bypass."""
    batch, total, height, width = g.shape
    rest = total if channels is not None else total - count
    pool = bypass is not None
    paths = 1 if weights is None else weights.numel()
    dmixed = [empty_map(g, batch, count, height, width) for _ in range(paths)]
    size = bypass.shape[2:] if pool else (height, width)
    dbypass = empty_map(g, batch, rest, *size) if bypass_grad else g.new_empty(0)
    if g.numel() == 0:
        dw = None if mixed is None else torch.zeros_like(weights, memory_format=torch.contiguous_format)
        return dmixed, dw, dbypass.zero_()
    programs, at = _tile("partial_shuffle_bwd", g, count, channels is not None)
    (g,), g_strides = walkable([g], g)
    mixed_strides, parts = (0, 0, 0), None
    sums, acc = accumulate_in(g.dtype)
    if mixed is not None:
        mixed, mixed_strides = walkable(mixed, g)
        parts = torch.empty((paths, programs), dtype=sums, device=g.device)
    row, dx_strides = width, (0, 0, 0, 0)
    if bypass_grad:
        row, s_h, s_w = (width, dbypass.stride(2), dbypass.stride(3)) if pool else _pixels(dbypass)
        dx_strides = (*dbypass.stride()[:2], s_h, s_w)
    launch(
        g.device,
        partial_shuffle_bwd_kernel,
        programs,
        g,
        mixed,
        None if weights is None else weights.contiguous(),
        bypass,
        None if channels is None else channels.contiguous(),
        tuple(dmixed),
        dbypass if bypass_grad else None,
        parts,
        total,
        count,
        height * width,
        row,
        *(bypass.shape[2:] if pool else (1, 1)),
        *g_strides,
        *mixed_strides,
        *planes(dmixed[0]),
        *(bypass.stride() if pool else (0, 0, 0, 0)),
        *dx_strides,
        K=paths,
        SUBSET=channels is not None,
        POOL=pool,
        ACC=acc,
        **at,
    )
    return dmixed, None if parts is None else ordered_sum(parts, weights), dbypass


def partial_shuffle_bwd(
    g: Tensor,
    mixed: Sequence[Tensor],
    weights: Tensor,
    bypass: Tensor | None,
    channels: Tensor | None,
    bypass_grad: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradients of the mixed tensors, of the weights, and of the bypass (empty when it is not wanted)."""
    return _gradients(g, mixed, weights, bypass, channels, mixed[0].shape[1], bypass_grad)


def partial_shuffle_bwd_frozen(
    g: Tensor,
    weights: Tensor | None,
    bypass: Tensor | None,
    channels: Tensor | None,
    count: int,
    bypass_grad: bool,
) -> tuple[list[Tensor], Tensor]:
    """The same without the gradient of the weights, for which the mixed tensors are not needed."""
    dmixed, _, dbypass = _gradients(g, None, weights, bypass, channels, count, bypass_grad)
    return dmixed, dbypass
