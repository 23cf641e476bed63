"""Triton kernels of ``norm_mixed_sum``: statistics, the folded sum, and a backward of two passes.

All of them walk ``[B, C, ...]`` maps as tiles of BC channels by BQ positions, where position ``q = b S + s`` counts
pixel s of image b; strides make the layout. Sums over positions are written tile by tile and added in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnas.kernels._launch import accumulate_in, config, float_bits, laid_out_as, launch, ordered_sum, planes
from fastnas.kernels._moments import combine_moments, sum_rows


@triton.jit
def _tile(C, Q, S, s_b, s_c, s_p, BC: tl.constexpr, BQ: tl.constexpr):
    """Channels [BC], offsets and mask [BC, BQ] of this program's tile, its number and how many there are."""
    T = tl.cdiv(Q, BQ)
    i_t, i_c = tl.program_id(0) % T, tl.program_id(0) // T  # 64 bits when Q, and with it T, needs them
    o_c = i_c * BC + tl.arange(0, BC)
    o_q = i_t * BQ + tl.arange(0, BQ)
    o = (o_q // S).to(tl.int64) * s_b + (o_q % S).to(tl.int64) * s_p  # [BQ]
    m = (o_c < C)[:, None] & (o_q < Q)[None, :]
    return o_c, o_c.to(tl.int64)[:, None] * s_c + o[None, :], m, i_t, T


@triton.jit
def _normaliser(p_mean, p_var, k, o_c, C, eps, ACC: tl.constexpr):
    """Mean and 1 / sqrt(var + eps) of tensor k, [BC, 1] each."""
    b_mean = tl.load(p_mean + k * C + o_c, mask=o_c < C, other=0.0).to(ACC)
    b_var = tl.load(p_var + k * C + o_c, mask=o_c < C, other=1.0).to(ACC)
    return b_mean[:, None], tl.rsqrt(b_var + eps)[:, None]


@triton.jit
def _eps(eps_bits, ACC: tl.constexpr):
    """eps from the bits of a float64: Triton would round a float argument to float32."""
    return eps_bits.to(tl.int64).to(tl.float64, bitcast=True).to(ACC)


@triton.jit
def norm_mixed_sum_stats_kernel(
    p_ys, p_parts, C, Q, S, s_b, s_c, s_p, K: tl.constexpr, ACC: tl.constexpr, BC: tl.constexpr, BQ: tl.constexpr
):
    """Mean and sum of squared deviations from it, of each tensor and channel over the tile's positions.

    Grid: C / BC times Q / BQ programs. Tile: BC channels by BQ positions. Reads each y once, writes 2 K BC numbers.
    Bound by memory bandwidth. Deviations from the tile's own mean, not squares, and their mean added to it in float64:
    a mean far larger than the deviations costs no precision.
    """
    o_c, o, m, i_t, T = _tile(C, Q, S, s_b, s_c, s_p, BC, BQ)
    count = tl.minimum(Q - i_t.to(tl.int64) * BQ, BQ).to(ACC)
    p_part = p_parts + o_c.to(tl.int64) * T + i_t  # [2, K, C, T]
    for k in tl.static_range(K):
        b_y = tl.load(p_ys[k] + o, mask=m, other=0.0).to(ACC)  # [BC, BQ]
        b_near = tl.sum(b_y, 1) / count
        b_off = tl.where(m, b_y - b_near[:, None], 0.0)
        b_rest = tl.sum(b_off, 1) / count
        b_m2 = tl.sum(b_off * b_off, 1) - count * b_rest * b_rest
        tl.store(p_part + k * tl.cast(C, tl.int64) * T, b_near.to(tl.float64) + b_rest.to(tl.float64), mask=o_c < C)
        tl.store(p_part + (K + k) * tl.cast(C, tl.int64) * T, b_m2.to(tl.float64), mask=o_c < C)


@triton.jit
def norm_mixed_sum_combine_kernel(
    p_parts, p_mean, p_var, R, Q, T, BQ: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr
):
    """Mean and biased variance of R = K C rows from T tiles of BQ positions each, the last one shorter; in float64.

    Grid: R / BR programs. Tile: BR rows by BT parts. Reads 3 R T parts, writes 2 R numbers. Bound by its launch.
    """
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    b_mean, b_var = combine_moments(p_parts, o_r, R, Q, T, BQ, BR, BT)
    tl.store(p_mean + o_r, b_mean.to(p_mean.dtype.element_ty), mask=o_r < R)
    tl.store(p_var + o_r, b_var.to(p_var.dtype.element_ty), mask=o_r < R)


@triton.jit(do_not_specialize=["eps_bits"])
def norm_mixed_sum_scale_kernel(p_w, p_var, p_scale, eps_bits, R, C, BR: tl.constexpr):
    """``scale[k, c] = w[k] / sqrt(var[k, c] + eps)``, in float64, for the R = K C rows.

    Grid: R / BR programs. Tile: BR rows. Reads and writes R numbers. Bound by its launch. On its own because the folded
    sum of a long list would spill if it kept four numbers a tensor and channel instead of two.
    """
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    b_w = tl.load(p_w + o_r // C, mask=o_r < R, other=0.0).to(tl.float64)
    b_var = tl.load(p_var + o_r, mask=o_r < R, other=1.0).to(tl.float64)
    b_scale = b_w / tl.sqrt(b_var + _eps(eps_bits, tl.float64))
    tl.store(p_scale + o_r, b_scale.to(p_scale.dtype.element_ty), mask=o_r < R)


@triton.jit
def norm_mixed_sum_fold_kernel(
    p_ys,
    p_plain,
    p_w,
    p_scale,
    p_mean,
    p_out,
    C,
    Q,
    S,
    s_b,
    s_c,
    s_p,
    K: tl.constexpr,
    J: tl.constexpr,
    ACC: tl.constexpr,
    BC: tl.constexpr,
    BQ: tl.constexpr,
):
    """``out = sum_k scale[k, c] (y_k - mean[k, c]) + sum_j w[K + j] x_j``.

    Grid and tile as for the statistics. Reads each y and x once, writes out once: (K + J + 1) C Q elements. Bound by
    memory bandwidth; the normalised tensors live in registers only.
    """
    o_c, o, m, _, _ = _tile(C, Q, S, s_b, s_c, s_p, BC, BQ)
    b_out = tl.zeros((BC, BQ), ACC)
    for k in tl.static_range(K):
        b_scale = tl.load(p_scale + k * C + o_c, mask=o_c < C, other=0.0).to(ACC)[:, None]  # [BC, 1]
        b_mean = tl.load(p_mean + k * C + o_c, mask=o_c < C, other=0.0).to(ACC)[:, None]
        b_out += b_scale * (tl.load(p_ys[k] + o, mask=m, other=0.0).to(ACC) - b_mean)  # [BC, BQ]
    for j in tl.static_range(J):
        b_out += tl.load(p_w + K + j).to(ACC) * tl.load(p_plain[j] + o, mask=m, other=0.0).to(ACC)
    tl.store(p_out + o, b_out.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def norm_mixed_sum_dots_kernel(
    p_g,
    p_ys,
    p_plain,
    p_mean,
    p_parts,
    C,
    Q,
    S,
    s_b,
    s_c,
    s_p,
    K: tl.constexpr,
    J: tl.constexpr,
    ACC: tl.constexpr,
    BC: tl.constexpr,
    BQ: tl.constexpr,
):
    """Sums over the tile's positions, by channel: of ``g``, of ``g (y_k - mean)`` and of ``g x_j``.

    Grid and tile as forward. Reads g and each y and x once, writes 1 + K + J numbers a channel. Bound by memory
    bandwidth.
    """
    o_c, o, m, i_t, T = _tile(C, Q, S, s_b, s_c, s_p, BC, BQ)
    b_g = tl.load(p_g + o, mask=m, other=0.0).to(ACC)  # [BC, BQ]
    p_part = p_parts + o_c.to(tl.int64) * T + i_t  # [1 + K + J, C, T]
    tl.store(p_part, tl.sum(b_g, 1), mask=o_c < C)
    for k in tl.static_range(K):
        b_mean = tl.load(p_mean + k * C + o_c, mask=o_c < C, other=0.0).to(ACC)[:, None]
        b_y = tl.load(p_ys[k] + o, mask=m, other=0.0).to(ACC)
        b_dot = tl.sum(b_g * (b_y - b_mean), 1)
        tl.store(p_part + (1 + k) * tl.cast(C, tl.int64) * T, b_dot, mask=o_c < C)
    for j in tl.static_range(J):
        b_dot = tl.sum(b_g * tl.load(p_plain[j] + o, mask=m, other=0.0).to(ACC), 1)
        tl.store(p_part + (1 + K + j) * tl.cast(C, tl.int64) * T, b_dot, mask=o_c < C)


@triton.jit(do_not_specialize=["eps_bits"])
def norm_mixed_sum_sums_kernel(
    p_parts, p_var, p_sums, eps_bits, R, C, T, K: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr
):
    """Sums of R rows [1 + K + J, C] over T tiles, those of tensor k times 1 / sqrt(var + eps); in float64.

    Grid: R / BR programs. Tile: BR rows by BT parts. Reads R T parts once, writes R numbers. Bound by its launch.
    """
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    normalised = (o_r >= C) & (o_r < tl.cast(C, tl.int64) * (1 + K))
    b_var = tl.load(p_var + o_r - C, mask=normalised, other=1.0).to(tl.float64)
    b_r = tl.where(normalised, 1.0 / tl.sqrt(b_var + _eps(eps_bits, tl.float64)), 1.0)
    tl.store(p_sums + o_r, (sum_rows(p_parts, o_r, R, T, BR, BT) * b_r).to(p_sums.dtype.element_ty), mask=o_r < R)


@triton.jit(do_not_specialize=["eps_bits"])
def norm_mixed_sum_maps_kernel(
    p_g,
    p_ys,
    p_w,
    p_mean,
    p_var,
    p_sums,
    p_dys,
    p_dplain,
    eps_bits,
    C,
    Q,
    S,
    s_b,
    s_c,
    s_p,
    K: tl.constexpr,
    J: tl.constexpr,
    ACC: tl.constexpr,
    BC: tl.constexpr,
    BQ: tl.constexpr,
):
    """``dy_k = w[k] r (g - (sum g + r (y_k - mean) dot_k) / Q)`` and ``dx_j = w[K + j] g``.

    ``sums`` is [1 + K, C]: sum g, then dot_k = sum g r (y_k - mean). Without it the statistics were constants, and
    ``dy_k = w[k] r g``. Grid and tile as forward. Reads g and each y once, writes each gradient once: (1 + 2 K + J) C Q
    elements. Bound by memory bandwidth.
    """
    o_c, o, m, _, _ = _tile(C, Q, S, s_b, s_c, s_p, BC, BQ)
    eps = _eps(eps_bits, ACC)
    b_g = tl.load(p_g + o, mask=m, other=0.0).to(ACC)  # [BC, BQ]
    for k in tl.static_range(K):
        b_mean, b_r = _normaliser(p_mean, p_var, k, o_c, C, eps, ACC)
        b_dy = b_g
        if p_sums is not None:
            b_total = tl.load(p_sums + o_c, mask=o_c < C, other=0.0).to(ACC)[:, None]
            b_dot = tl.load(p_sums + (1 + k) * C + o_c, mask=o_c < C, other=0.0).to(ACC)[:, None]
            b_y = tl.load(p_ys[k] + o, mask=m, other=0.0).to(ACC)
            b_dy = b_g - (b_total + (b_y - b_mean) * b_r * b_dot) / tl.cast(Q, ACC)
        b_dy = tl.load(p_w + k).to(ACC) * b_r * b_dy
        tl.store(p_dys[k] + o, b_dy.to(p_g.dtype.element_ty), mask=m)
    for j in tl.static_range(J):
        tl.store(p_dplain[j] + o, (tl.load(p_w + K + j).to(ACC) * b_g).to(p_g.dtype.element_ty), mask=m)


def _walkable(like: Tensor) -> Tensor:
    """A fresh tensor whose pixels lie at one stride: ``empty_like``, or contiguous where its pixels do not."""
    out = torch.empty_like(like)
    return out if planes(out) is not None else torch.empty_like(like, memory_format=torch.contiguous_format)


def _finished(out: Tensor, like: Tensor) -> Tensor:
    """``out`` in the layout that the fake kernels promise."""
    result = torch.empty_like(like)
    return out if planes(result) is not None else result.copy_(out)


def _sizes(y: Tensor) -> tuple[int, int, int]:
    """Channels, positions, and pixels an image."""
    channels = y.shape[1]
    positions = y.numel() // channels
    return channels, positions, positions // y.shape[0]


def _tiles(kernel: str, y: Tensor) -> tuple[int, int, dict[str, Any]]:
    """Programs, tiles along the positions and constants: channels are a tile's width in channels last only."""
    at = config(kernel, y)
    block = at.pop("BLOCK")
    channels, positions, _ = _sizes(y)
    last = y.stride(1) == 1 and channels > 1
    bc = min(triton.next_power_of_2(channels), 64, block) if last else 1
    bq = min(triton.next_power_of_2(positions), block // bc)
    if not last:  # small maps: several channels fill the tile
        bc = min(triton.next_power_of_2(channels), block // bq)
    tiles = triton.cdiv(positions, bq)
    _, acc = accumulate_in(y.dtype)
    return tiles * triton.cdiv(channels, bc), tiles, {"ACC": acc, "BC": bc, "BQ": bq, **at}


def _statistics(ys: tuple[Tensor, ...], like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, ``[K, C]`` each."""
    channels, positions, pixels = _sizes(like)
    sums, _ = accumulate_in(like.dtype)
    programs, tiles, at = _tiles("norm_mixed_sum_stats", like)
    rows = len(ys) * channels
    parts = torch.empty((2, rows, tiles), dtype=torch.float64, device=like.device)
    sizes = (channels, positions, pixels)
    launch(like.device, norm_mixed_sum_stats_kernel, programs, ys, parts, *sizes, *planes(like), K=len(ys), **at)
    mean, var = (torch.empty((len(ys), channels), dtype=sums, device=like.device) for _ in range(2))
    end = config("norm_mixed_sum_combine", mean)
    args = (parts, mean, var, rows, positions, tiles)
    programs = triton.cdiv(rows, end["BR"])
    launch(like.device, norm_mixed_sum_combine_kernel, programs, *args, BQ=at["BQ"], **end)
    return mean, var


def _fold(
    ys: tuple[Tensor, ...], plain: tuple[Tensor, ...], w: Tensor, mean: Tensor, var: Tensor, eps: float, out: Tensor
) -> None:
    sums, _ = accumulate_in(out.dtype)
    w, mean = w.contiguous(), mean.contiguous()
    scale = torch.empty(mean.shape, dtype=sums, device=out.device)
    start = config("norm_mixed_sum_scale", scale)
    args = (w, var.contiguous(), scale, float_bits(eps), scale.numel(), out.shape[1])
    launch(out.device, norm_mixed_sum_scale_kernel, triton.cdiv(scale.numel(), start["BR"]), *args, **start)
    programs, _, at = _tiles("norm_mixed_sum_fold", out)
    args = (ys, plain or None, w, scale, mean, out, *_sizes(out), *planes(out))
    launch(out.device, norm_mixed_sum_fold_kernel, programs, *args, K=len(ys), J=len(plain), **at)


def norm_mixed_sum_fwd(
    ys: Sequence[Tensor], plain: Sequence[Tensor], w: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum in the layout of ``empty_like(ys[0])``, and the statistics ``[K, C]`` of the batch."""
    out = _walkable(ys[0])
    if out.numel() == 0:
        sums, _ = accumulate_in(out.dtype)
        mean, var = (torch.zeros((len(ys), out.shape[1]), dtype=sums, device=out.device) for _ in range(2))
        return _finished(out, ys[0]), mean, var
    like, ys, plain = ys[0], laid_out_as(out, ys), laid_out_as(out, plain)
    mean, var = _statistics(ys, out)
    _fold(ys, plain, w, mean, var, eps, out)
    return _finished(out, like), mean, var


def norm_mixed_sum_eval(
    ys: Sequence[Tensor], plain: Sequence[Tensor], w: Tensor, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    """The sum with statistics that are given."""
    out = _walkable(ys[0])
    if out.numel():
        _fold(laid_out_as(out, ys), laid_out_as(out, plain), w, mean, var, eps, out)
    return _finished(out, ys[0])


def _dots(
    g: Tensor, ys: tuple[Tensor, ...], plain: tuple[Tensor, ...], mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    """``[1 + K + J, C]``: sums over positions of g, of g times each normalised y, of g times each plain x."""
    sums, _ = accumulate_in(g.dtype)
    programs, tiles, at = _tiles("norm_mixed_sum_dots", g)
    count, channels = 1 + len(ys) + len(plain), g.shape[1]
    rows = count * channels
    parts = torch.empty((rows, tiles), dtype=sums, device=g.device)
    args = (g, ys or None, plain or None, mean, parts, *_sizes(g), *planes(g))
    launch(g.device, norm_mixed_sum_dots_kernel, programs, *args, K=len(ys), J=len(plain), **at)
    out = torch.empty((count, channels), dtype=sums, device=g.device)
    end = config("norm_mixed_sum_sums", out)
    args = (parts, var, out, float_bits(eps), rows, channels, tiles)
    launch(g.device, norm_mixed_sum_sums_kernel, triton.cdiv(rows, end["BR"]), *args, K=len(ys), **end)
    return out


def _maps(
    g: Tensor,
    ys: tuple[Tensor, ...],
    w: Tensor,
    mean: Tensor,
    var: Tensor,
    sums: Tensor | None,
    eps: float,
    like: Tensor,
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the ys and of the plain maps, from dense tensors; with ``sums`` through the statistics too."""
    count = mean.shape[0]
    out = [_walkable(like) for _ in range(w.numel())]
    programs, _, at = _tiles("norm_mixed_sum_maps", g)
    dys, dplain = tuple(out[:count]), tuple(out[count:])
    args = (g, ys or None, w.contiguous(), mean, var, sums, dys, dplain or None, float_bits(eps))
    where = (*_sizes(g), *planes(g))
    launch(g.device, norm_mixed_sum_maps_kernel, programs, *args, *where, K=count, J=len(dplain), **at)
    out = [_finished(t, like) for t in out]
    return out[:count], out[count:]


def norm_mixed_sum_bwd(
    g: Tensor,
    ys: Sequence[Tensor],
    plain: Sequence[Tensor],
    w: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    training: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Gradients of the ys, of the plain maps and of the weights."""
    like = ys[0]
    if g.numel() == 0:
        return *_empty_maps(like, w, mean), torch.zeros_like(w, memory_format=torch.contiguous_format)
    g, *maps = laid_out_as(_walkable(like), (g, *ys, *plain))
    ys, plain, mean, var = tuple(maps[: len(ys)]), tuple(maps[len(ys) :]), mean.contiguous(), var.contiguous()
    sums = _dots(g, ys, plain, mean, var, eps)
    dys, dplain = _maps(g, ys, w, mean, var, sums if training else None, eps, like)
    return dys, dplain, ordered_sum(sums[1:], w)


def norm_mixed_sum_bwd_maps(
    g: Tensor, ys: Sequence[Tensor], w: Tensor, mean: Tensor, var: Tensor, eps: float, training: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the ys and of the plain maps; in evaluation no map is needed for them."""
    like = ys[0] if ys else g
    if g.numel() == 0:
        return _empty_maps(like, w, mean)
    g, *ys = laid_out_as(_walkable(like), (g, *ys))
    mean, var = mean.contiguous(), var.contiguous()
    sums = _dots(g, tuple(ys), (), mean, var, eps) if training else None
    return _maps(g, tuple(ys), w, mean, var, sums, eps, like)


def norm_mixed_sum_bwd_w(
    g: Tensor, ys: Sequence[Tensor], plain: Sequence[Tensor], w: Tensor, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    """Gradient of the weights alone."""
    if g.numel() == 0:
        return torch.zeros_like(w, memory_format=torch.contiguous_format)
    g, *maps = laid_out_as(_walkable(ys[0]), (g, *ys, *plain))
    ys, plain = tuple(maps[: len(ys)]), tuple(maps[len(ys) :])
    return ordered_sum(_dots(g, ys, plain, mean.contiguous(), var.contiguous(), eps)[1:], w)


def _empty_maps(like: Tensor, w: Tensor, mean: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    count = mean.shape[0]
    return [torch.empty_like(like) for _ in range(count)], [torch.empty_like(like) for _ in range(w.numel() - count)]
