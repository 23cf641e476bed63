"""Triton kernels of ``pool_stage``: max and average pooling (3x3) of a node, their statistics and their gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnas.kernels._launch import accumulate_in, launch
from fastnas.kernels._maps import takes_over, window_count
from fastnas.kernels._stages import (
    new_parts,
    pitch,
    pitches,
    position_tile,
    row_of,
    statistics,
    store_statistics,
    tiles,
)


@triton.jit
def _pools(p_x, x_pitch, o_q, o_c, C, Q, H, W, HO, WO, STRIDE: tl.constexpr, ACC: tl.constexpr):
    """Maximum, its place among the nine pixels and average of the windows o_q [BQ], channels o_c: [BQ, BC] each.

    The first of equal maxima and the last NaN is taken, as max_pool2d does.
    """
    o_h, o_w = o_q // WO % HO * STRIDE, o_q % WO * STRIDE
    image = (o_q // (HO * WO)).to(tl.int64) * H
    m = (o_q < Q)[:, None] & (o_c < C)[None, :]
    b_max = tl.full((o_q.shape[0], o_c.shape[0]), float("-inf"), ACC)
    b_sum = tl.zeros((o_q.shape[0], o_c.shape[0]), ACC)
    first = tl.where(o_h == 0, 3, 0) + tl.where(o_w == 0, 1, 0)  # for windows of nothing but -inf
    b_at = tl.zeros((o_q.shape[0], o_c.shape[0]), tl.int32) + first[:, None]
    for t in range(9):
        h, w = o_h + t // 3 - 1, o_w + t % 3 - 1
        inside = m & ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
        at = ((image + h) * W + w)[:, None] * x_pitch + o_c[None, :]
        b_x = tl.load(p_x + at, mask=inside, other=0.0).to(ACC)
        takes = inside & takes_over(b_x, b_max)
        b_max = tl.where(takes, b_x, b_max)
        b_at = tl.where(takes, t, b_at)
        b_sum += b_x
    return tl.where(m, b_max, 0.0), b_at, b_sum / window_count(o_h, o_w, H, W).to(ACC)[:, None]


@triton.jit
def pool_stage_fwd_kernel(
    p_x,
    p_out,
    p_stats,
    x_pitch,
    C,
    Q,
    H,
    W,
    HO,
    WO,
    STRIDE: tl.constexpr,
    ACC: tl.constexpr,
    BQ: tl.constexpr,
    BC: tl.constexpr,
):
    """Maximum and average of the 3x3 windows of x, ``out [2, Q, C]``, and the tile's part of their statistics.

    Grid: Q / BQ times C / BC programs. Tile: BQ outputs by BC channels. Reads x from memory once (9 times from the
    level 1 cache), writes both pools. Bound by the issue of loads.
    """
    i_t, o_q, o_c, m = position_tile(Q, C, BQ, BC)
    b_max, _, b_avg = _pools(p_x, x_pitch, o_q, o_c, C, Q, H, W, HO, WO, STRIDE, ACC)
    o_out = o_q.to(tl.int64)[:, None] * C + o_c[None, :]
    tl.store(p_out + o_out, b_max.to(p_out.dtype.element_ty), mask=m)
    tl.store(p_out + tl.cast(Q, tl.int64) * C + o_out, b_avg.to(p_out.dtype.element_ty), mask=m)
    if p_stats is not None:
        T = tl.cdiv(Q, BQ)
        count = tl.minimum(Q - i_t * BQ, BQ).to(ACC)
        p_part = p_stats + o_c.to(tl.int64) * T + i_t  # [2, 2 C, T]
        store_statistics(b_max, m, p_part, 2 * C, o_c < C, T, count, ACC)
        store_statistics(b_avg, m, p_part + tl.cast(C, tl.int64) * T, 2 * C, o_c < C, T, count, ACC)


@triton.jit
def pool_stage_given_kernel(
    p_x,
    p_gs,
    p_scales,
    p_coef,
    p_given,
    p_places,
    x_pitch,
    g_pitches,
    C,
    Q,
    H,
    W,
    HO,
    WO,
    N: tl.constexpr,
    STRIDE: tl.constexpr,
    ACC: tl.constexpr,
    BQ: tl.constexpr,
    BC: tl.constexpr,
):
    """The gradients that reach both pools, ``given [2, Q, C]``, the average's by its count, and the maxima's places.

    ``sum_n scales[n, p] gs[n] + coef[p, 0] (pool - coef[p, 2]) + coef[p, 1]``. Grid and tile as forward. Reads x and
    each g once, writes two maps and a byte an output. Bound by the issue of loads.
    """
    _, o_q, o_c, m = position_tile(Q, C, BQ, BC)
    b_max, b_at, b_avg = _pools(p_x, x_pitch, o_q, o_c, C, Q, H, W, HO, WO, STRIDE, ACC)
    b_max = row_of(p_coef, o_c, C, ACC) * (b_max - row_of(p_coef + 2 * C, o_c, C, ACC)) + row_of(
        p_coef + C, o_c, C, ACC
    )
    p_avg = p_coef + 3 * C
    b_avg = row_of(p_avg, o_c, C, ACC) * (b_avg - row_of(p_avg + 2 * C, o_c, C, ACC)) + row_of(p_avg + C, o_c, C, ACC)
    for n in tl.static_range(N):
        o_g = o_q.to(tl.int64)[:, None] * g_pitches[n] + o_c[None, :]
        b_g = tl.load(p_gs[n] + o_g, mask=m, other=0.0).to(ACC)  # [BQ, BC]
        b_max += row_of(p_scales + 3 * n * C, o_c, C, ACC) * b_g
        b_avg += row_of(p_scales + (3 * n + 1) * C, o_c, C, ACC) * b_g
    b_avg = b_avg / window_count(o_q // WO % HO * STRIDE, o_q % WO * STRIDE, H, W).to(ACC)[:, None]
    o_out = o_q.to(tl.int64)[:, None] * C + o_c[None, :]
    tl.store(p_given + o_out, b_max.to(p_given.dtype.element_ty), mask=m)
    tl.store(p_given + tl.cast(Q, tl.int64) * C + o_out, b_avg.to(p_given.dtype.element_ty), mask=m)
    tl.store(p_places + o_out, b_at.to(tl.int8), mask=m)


@triton.jit
def pool_stage_dx_kernel(
    p_given,
    p_places,
    p_gs,
    p_scales,
    p_base,
    p_dx,
    g_pitches,
    base_pitch,
    C,
    Q,
    X,
    H,
    W,
    HO,
    WO,
    N: tl.constexpr,
    STRIDE: tl.constexpr,
    ACC: tl.constexpr,
    BQ: tl.constexpr,
    BC: tl.constexpr,
):
    """What the nine windows around a pixel send it, plus ``base`` and, at stride 1, ``sum_n scales[n, 2] gs[n]``.

    Grid: X / BQ times C / BC programs. Tile: BQ pixels of x by BC channels. Reads the given gradients and places from
    memory once (9 times from the level 1 cache) and each g once, writes dx once. Bound by the issue of loads.
    """
    _, o_x, o_c, m = position_tile(X, C, BQ, BC)
    o_h, o_w = o_x // W % H, o_x % W
    image = (o_x // (H * W)).to(tl.int64) * HO
    b_dx = tl.zeros((BQ, BC), ACC)
    for t in range(9):
        h, w = o_h + 1 - t // 3, o_w + 1 - t % 3
        inside = (h >= 0) & (w >= 0) & (h % STRIDE == 0) & (w % STRIDE == 0)
        h, w = h // STRIDE, w // STRIDE
        inside = m & (inside & (h < HO) & (w < WO))[:, None]
        at = ((image + h) * WO + w)[:, None] * C + o_c[None, :]
        b_max = tl.load(p_given + at, mask=inside, other=0.0).to(ACC)
        b_dx += tl.where(tl.load(p_places + at, mask=inside, other=-1) == t, b_max, 0.0)
        b_dx += tl.load(p_given + tl.cast(Q, tl.int64) * C + at, mask=inside, other=0.0).to(ACC)
    o_q = o_x.to(tl.int64)[:, None]
    if STRIDE == 1:
        for n in tl.static_range(N):
            b_g = tl.load(p_gs[n] + o_q * g_pitches[n] + o_c[None, :], mask=m, other=0.0).to(ACC)
            b_dx += row_of(p_scales + (3 * n + 2) * C, o_c, C, ACC) * b_g
    if p_base is not None:
        b_dx += tl.load(p_base + o_q * base_pitch + o_c[None, :], mask=m, other=0.0).to(ACC)
    tl.store(p_dx + o_q * C + o_c[None, :], b_dx.to(p_dx.dtype.element_ty), mask=m)


def _sizes(x: Tensor, stride: int) -> tuple[int, int, int, int]:
    height, width = x.shape[1:3]
    return height, width, -(-height // stride), -(-width // stride)


def pool_stage_fwd(x: Tensor, stride: int, statistics_wanted: bool) -> tuple[Tensor, Tensor]:
    """Both pools ``[2, B, H', W', C]``, and mean and variance ``[2, 2, C]`` if wanted."""
    sizes, channels = _sizes(x, stride), x.shape[-1]
    out = x.new_empty(2, x.shape[0], *sizes[2:], channels)
    if x.numel() == 0:
        return out, x.new_zeros((2, 2, channels) if statistics_wanted else 0, dtype=accumulate_in(x.dtype)[0])
    rows, columns, at = tiles("pool_stage_fwd", out[0], channels)
    positions = out[0].numel() // channels
    partial = new_parts(x, 2, 2 * channels, rows) if statistics_wanted else None
    args = (x, out, partial, pitch(x), channels, positions, *sizes)
    launch(x.device, pool_stage_fwd_kernel, rows * columns, *args, STRIDE=stride, **at)
    return out, x.new_empty(0) if partial is None else statistics(partial, x, 2, positions, at["BQ"])


def pool_stage_bwd(
    x: Tensor, gs: Sequence[Tensor], scales: Tensor, coef: Tensor, stride: int, base: Tensor | None
) -> Tensor:
    """dx ``[B, H, W, C]``."""
    batch, _, _, channels = x.shape
    dx = x.new_empty(x.shape)
    if x.numel() == 0:
        return dx
    sizes, gs, scales = _sizes(x, stride), tuple(gs), scales.contiguous()
    given = x.new_empty(2, batch, *sizes[2:], channels)
    places = torch.empty(given.shape[1:], dtype=torch.int8, device=x.device)
    positions = places.numel() // channels
    rows, columns, at = tiles("pool_stage_given", given[0], channels)
    args = (x, gs, scales, coef.contiguous(), given, places, pitch(x), pitches(gs), channels, positions, *sizes)
    launch(x.device, pool_stage_given_kernel, rows * columns, *args, N=len(gs), STRIDE=stride, **at)
    rows, columns, at = tiles("pool_stage_dx", x, channels)
    where = (0 if base is None else pitch(base), channels, positions, x.numel() // channels, *sizes)
    args = (given, places, gs, scales, base, dx, pitches(gs), *where)
    launch(x.device, pool_stage_dx_kernel, rows * columns, *args, N=len(gs), STRIDE=stride, **at)
    return dx
