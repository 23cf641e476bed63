"""Triton kernels of ``partial_join``: mixed and bypassed channels of a PC-DARTS node joined and shuffled, and back.

Channel ``g C / K + i`` of a state is channel ``i K + g`` of a node; those with g = 0 are mixed.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastnas.kernels._launch import accumulate_in, launch
from fastnas.kernels._maps import takes_over
from fastnas.kernels._stages import new_parts, pitch, pitches, position_tile, row_sums, tiles


@triton.jit
def _pixel(p_x, x_pitch, image, h, w, H, W, o_c, m, ACC: tl.constexpr):
    """Pixel (h, w) [BQ] and channels o_c [BC] of a map, minus infinity outside: [BQ, BC]."""
    inside = m & ((h < H) & (w < W))[:, None]
    at = ((image * H + h) * W + w)[:, None] * x_pitch + o_c[None, :]
    return tl.load(p_x + at, mask=inside, other=float("-inf")).to(ACC)


@triton.jit
def _pooled(p_x, x_pitch, image, h, w, H, W, o_c, m, STRIDE: tl.constexpr, ACC: tl.constexpr):
    """The map at pixel (h, w) of its node: 2x2 max-pooled where the edge has stride 2."""
    b_x = _pixel(p_x, x_pitch, image, h * STRIDE, w * STRIDE, H, W, o_c, m, ACC)
    if STRIDE == 2:
        for t in tl.static_range(1, 4):
            b_at = _pixel(p_x, x_pitch, image, h * 2 + t // 2, w * 2 + t % 2, H, W, o_c, m, ACC)
            b_x = tl.where(takes_over(b_at, b_x), b_at, b_x)
    return tl.where(m, b_x, 0.0)


@triton.jit
def partial_join_kernel(
    p_mixed,
    p_xs,
    p_betas,
    p_out,
    pitches,
    heights,
    widths,
    mixed_pitch,
    out_pitch,
    C,
    S,
    Q,
    H,
    W,
    STRIDES: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ACC: tl.constexpr,
    BQ: tl.constexpr,
    BC: tl.constexpr,
):
    """``out[i K + g] = mixed[i]`` for g = 0, else ``sum_n betas[n] x_n[g S + i]``, for S = C / K.

    Grid: Q / BQ times C / BC programs. Tile: BQ pixels by BC channels of out. Reads mixed and the bypassed channels of
    every x once, writes out once. Bound by memory bandwidth; neighbours of a node are S apart in a state.
    """
    _, o_q, o_c, m = position_tile(Q, C, BQ, BC)
    group, o_i = o_c % K, o_c // K
    h, w, image = o_q // W % H, o_q % W, (o_q // (H * W)).to(tl.int64)
    m_x = m & (group > 0)[None, :]
    b_out = tl.zeros((BQ, BC), ACC)
    for n in tl.static_range(N):
        b_x = _pooled(p_xs[n], pitches[n], image, h, w, heights[n], widths[n], group * S + o_i, m_x, STRIDES[n], ACC)
        b_out += tl.load(p_betas + n).to(ACC) * b_x
    m_mixed = m & (group == 0)[None, :]
    o_q = o_q.to(tl.int64)[:, None]
    b_out += tl.load(p_mixed + o_q * mixed_pitch + o_i[None, :], mask=m_mixed, other=0.0).to(ACC)
    tl.store(p_out + o_q * out_pitch + o_c[None, :], b_out.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def partial_join_bwd_kernel(
    p_g,
    p_xs,
    p_mixed,
    p_parts,
    pitches,
    heights,
    widths,
    g_pitch,
    C,
    S,
    Q,
    H,
    W,
    P,
    STRIDES: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    ACC: tl.constexpr,
    BQ: tl.constexpr,
    BC: tl.constexpr,
):
    """``mixed[i] = g[i K]``, and the tile's part of ``sum g[i K + j] x_n[j S + i]`` over j > 0 for every n.

    Grid and tile as forward. Reads g and the bypassed channels of every x once, writes mixed and N numbers. Bound by
    memory bandwidth.
    """
    _, o_q, o_c, m = position_tile(Q, C, BQ, BC)
    group, o_i = o_c % K, o_c // K
    h, w, image = o_q // W % H, o_q % W, (o_q // (H * W)).to(tl.int64)
    b_g = tl.load(p_g + o_q.to(tl.int64)[:, None] * g_pitch + o_c[None, :], mask=m, other=0.0).to(ACC)
    o_mixed = o_q.to(tl.int64)[:, None] * S + o_i[None, :]
    tl.store(p_mixed + o_mixed, b_g.to(p_mixed.dtype.element_ty), mask=m & (group == 0)[None, :])
    m_x = m & (group > 0)[None, :]
    for n in tl.static_range(N):
        b_x = _pooled(p_xs[n], pitches[n], image, h, w, heights[n], widths[n], group * S + o_i, m_x, STRIDES[n], ACC)
        b_dot = tl.sum(tl.sum((b_g * b_x).to(tl.float64), 1), 0)
        tl.store(p_parts + n * tl.cast(P, tl.int64) + tl.program_id(0), b_dot)


@triton.jit
def partial_join_dx_kernel(
    p_x,
    p_gs,
    p_betas,
    p_mixed,
    p_base,
    p_dx,
    g_pitches,
    x_pitch,
    mixed_pitch,
    base_pitch,
    C,
    S,
    X,
    H,
    W,
    HO,
    WO,
    N: tl.constexpr,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
    ACC: tl.constexpr,
    BQ: tl.constexpr,
    BC: tl.constexpr,
):
    """``dx[c] = mixed[c]`` for c < S, else ``sum_n betas[n] gs[n]`` at its shuffled channel, plus ``base``.

    At stride 2 only the first maximum of each 2x2 window takes it. Grid: X / BQ times C / BC programs. Tile: BQ pixels
    by BC channels of x. Reads mixed, base and the bypassed channels of every g once (x four times from the cache at
    stride 2), writes dx once. Bound by memory bandwidth.
    """
    _, o_x, o_c, m = position_tile(X, C, BQ, BC)
    h, w, image = o_x // W % H, o_x % W, (o_x // (H * W)).to(tl.int64)
    m_g = m & (o_c >= S)[None, :]
    o_g = ((image * HO + h // STRIDE) * WO + w // STRIDE)[:, None]
    o_to = (o_c % S * K + o_c // S)[None, :]
    b_dx = tl.zeros((BQ, BC), ACC)
    for n in tl.static_range(N):
        b_g = tl.load(p_gs[n] + o_g * g_pitches[n] + o_to, mask=m_g, other=0.0).to(ACC)
        b_dx += tl.load(p_betas + n).to(ACC) * b_g
    if STRIDE == 2:
        top, left = h // 2 * 2, w // 2 * 2
        b_max = _pixel(p_x, x_pitch, image, top, left, H, W, o_c, m_g, ACC)
        b_at = tl.zeros((BQ, BC), tl.int32)
        for t in tl.static_range(1, 4):
            b_x = _pixel(p_x, x_pitch, image, top + t // 2, left + t % 2, H, W, o_c, m_g, ACC)
            takes = takes_over(b_x, b_max)
            b_max = tl.where(takes, b_x, b_max)
            b_at = tl.where(takes, t, b_at)
        b_dx = tl.where(b_at == (h % 2 * 2 + w % 2)[:, None], b_dx, 0.0)
    o_x = o_x.to(tl.int64)[:, None]
    b_dx += tl.load(p_mixed + o_x * mixed_pitch + o_c[None, :], mask=m & (o_c < S)[None, :], other=0.0).to(ACC)
    if p_base is not None:
        b_dx += tl.load(p_base + o_x * base_pitch + o_c[None, :], mask=m, other=0.0).to(ACC)
    tl.store(p_dx + o_x * C + o_c[None, :], b_dx.to(p_dx.dtype.element_ty), mask=m)


def _lists(xs: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    """Pitches, heights and widths."""
    return pitches(xs), tuple(x.shape[1] for x in xs), tuple(x.shape[2] for x in xs)


def partial_join(
    out: Tensor, mixed: Tensor, xs: Sequence[Tensor], strides: Sequence[int], betas: Tensor, k: int
) -> None:
    """Writes ``out [B, H, W, C]``."""
    if out.numel() == 0:
        return
    _, height, width, channels = out.shape
    rows, columns, at = tiles("partial_join", out, channels)
    where = (pitch(mixed), pitch(out), channels, channels // k, out.numel() // channels, height, width)
    args = (mixed, tuple(xs), betas.contiguous(), out, *_lists(xs), *where)
    constants = {"STRIDES": tuple(strides), "N": len(xs), "K": k}
    launch(out.device, partial_join_kernel, rows * columns, *args, **constants, **at)


def partial_join_bwd(g: Tensor, xs: Sequence[Tensor], strides: Sequence[int], k: int) -> tuple[Tensor, Tensor]:
    """Gradients of the mixed channels ``[B, H, W, C / K]`` and of the betas ``[N]``."""
    batch, height, width, channels = g.shape
    if not xs:
        return g[..., ::k].contiguous(), g.new_empty(0, dtype=accumulate_in(g.dtype)[0])
    mixed = g.new_empty(batch, height, width, channels // k)
    d_betas = g.new_empty(len(xs), dtype=accumulate_in(g.dtype)[0])
    if g.numel() == 0:
        return mixed, d_betas.zero_()
    rows, columns, at = tiles("partial_join_bwd", g, channels)
    parts = new_parts(g, len(xs), rows * columns)
    where = (pitch(g), channels, channels // k, g.numel() // channels, height, width, rows * columns)
    args = (g, tuple(xs), mixed, parts, *_lists(xs), *where)
    constants = {"STRIDES": tuple(strides), "N": len(xs), "K": k}
    launch(g.device, partial_join_bwd_kernel, rows * columns, *args, **constants, **at)
    return mixed, row_sums(parts, d_betas)


def partial_join_dx(
    x: Tensor, gs: Sequence[Tensor], betas: Tensor, stride: int, k: int, mixed: Tensor, base: Tensor | None
) -> Tensor:
    """Gradient of a source state ``[B, H, W, C]``."""
    _, height, width, channels = x.shape
    dx = x.new_empty(x.shape)
    if x.numel() == 0:
        return dx
    rows, columns, at = tiles("partial_join_dx", x, channels)
    where = (pitches(gs), pitch(x), pitch(mixed), 0 if base is None else pitch(base), channels, channels // k)
    args = (x, tuple(gs), betas.contiguous(), mixed, base, dx, *where, x.numel() // channels, height, width)
    out = gs[0].shape[1:3]
    launch(x.device, partial_join_dx_kernel, rows * columns, *args, *out, N=len(gs), STRIDE=stride, K=k, **at)
    return dx
