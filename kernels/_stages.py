"""What the kernels of the engine's stages share: maps with a pixel pitch, lists indexed at run time, statistics.

A map is ``[B, H, W, C]`` with neighbouring channels; ``pitch`` elements lie between one pixel and the next. Position
``q = (b H + h) W + w`` counts its pixels, so that its address is ``q pitch + c``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnas.kernels import _launch
from fastnas.kernels._moments import combine_moments, sum_rows


def pitch(x: Tensor) -> int:
    """Elements from one pixel of the map ``x`` to the next.

    Raises:
        RuntimeError: the channels are not neighbours, or the pixels not evenly spaced.
    """
    batch, height, width, channels = x.shape
    step = x.stride(2) if width > 1 else x.stride(1) if height > 1 else x.stride(0) if batch > 1 else channels
    wanted = (height * width * step, width * step, step, 1)
    regular = all(size == 1 or have == want for size, have, want in zip(x.shape, x.stride(), wanted, strict=True))
    if x.numel() and not (regular and step >= channels):
        raise RuntimeError("the channels of a map must be neighbours in memory, its pixels evenly spaced")
    return step


def pitches(xs: Sequence[Tensor]) -> tuple[int, ...]:
    """The pitch of every map."""
    return tuple(pitch(x) for x in xs)


def block(count: int, limit: int, least: int = 1) -> int:
    """Channels or positions of a tile: a power of two that holds them all, between ``least`` and ``limit``."""
    return max(least, min(triton.next_power_of_2(count), limit))


def tiles(kernel: str, x: Tensor, channels: int) -> tuple[int, int, dict[str, Any]]:
    """Tiles along the positions of ``x`` and along its ``channels``; the constants ACC, BQ, BC and those of the table.

    The table's BLOCK is split into BC channels, all of them where they fit, and BQ positions.
    """
    at = _launch.config(kernel, x)
    size = at.pop("BLOCK")
    bc = block(channels, min(64, size))
    positions = x.numel() // x.shape[-1]
    bq = min(size // bc, triton.next_power_of_2(positions))
    _, acc = _launch.accumulate_in(x.dtype)
    return triton.cdiv(positions, bq), triton.cdiv(channels, bc), {"ACC": acc, "BQ": bq, "BC": bc, **at}


@triton.jit
def position_tile(Q, C, BQ: tl.constexpr, BC: tl.constexpr):
    """Number of this program's tile along the positions, its positions [BQ], channels [BC] and mask [BQ, BC]."""
    T = tl.cdiv(Q, BQ)
    i_t = tl.program_id(0) % T
    o_c = tl.program_id(0) // T * BC + tl.arange(0, BC)
    o_q = i_t * BQ + tl.arange(0, BQ)
    return i_t, o_q, o_c, (o_q < Q)[:, None] & (o_c < C)[None, :]


@triton.jit
def pick(p_xs, i, N: tl.constexpr):
    """Pointer i of a tuple of N: a chain of selects, because a tuple has constant indices only."""
    b_at = p_xs[0].to(tl.int64)
    for n in tl.static_range(1, N):
        b_at = tl.where(i == n, p_xs[n].to(tl.int64), b_at)
    return b_at.to(p_xs[0].dtype)


@triton.jit
def pick_number(numbers, i, N: tl.constexpr):
    """Number i of a tuple of N, as int64."""
    b_at = tl.cast(numbers[0], tl.int64)
    for n in tl.static_range(1, N):
        b_at = tl.where(i == n, tl.cast(numbers[n], tl.int64), b_at)
    return b_at


@triton.jit
def row_of(p, o_c, C, ACC: tl.constexpr):
    """Coefficients of the channels o_c [BC], as [1, BC]."""
    return tl.load(p + o_c, mask=o_c < C, other=0.0).to(ACC)[None, :]


@triton.jit
def store_statistics(b_z, m, p_part, rows, mask, T, count, ACC: tl.constexpr):
    """Mean and sum of squared deviations of the columns of the tile ``b_z`` [BQ, BC], ``count`` of its rows counting.

    ``p_part`` points at this tile's place in row 0 of [2, rows, T]; deviations are taken from the tile's own mean.
    """
    b_near = tl.sum(tl.where(m, b_z, 0.0), 0) / count
    b_off = tl.where(m, b_z - b_near[None, :], 0.0)
    b_rest = tl.sum(b_off, 0) / count
    b_m2 = tl.sum(b_off * b_off, 0) - count * b_rest * b_rest
    tl.store(p_part, b_near.to(tl.float64) + b_rest.to(tl.float64), mask=mask)
    tl.store(p_part + tl.cast(rows, tl.int64) * T, b_m2.to(tl.float64), mask=mask)


@triton.jit
def stage_statistics_kernel(p_parts, p_stats, R, C, Q, T, BQ: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr):
    """Mean and biased variance, ``stats [R / C, 2, C]``, of R rows from T tiles of BQ positions each; in float64.

    Grid: R / BR programs. Tile: BR rows by BT parts. Reads 3 R T parts, writes 2 R numbers. Bound by its launch.
    """
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    b_mean, b_var = combine_moments(p_parts, o_r, R, Q, T, BQ, BR, BT)
    p_out = p_stats + o_r // C * 2 * C + o_r % C
    to = p_stats.dtype.element_ty
    tl.store(p_out, b_mean.to(tl.float32).to(to) if to != tl.float64 else b_mean, mask=o_r < R)
    tl.store(p_out + C, b_var.to(tl.float32).to(to) if to != tl.float64 else b_var, mask=o_r < R)


def statistics(parts: Tensor, like: Tensor, maps: int, positions: int, bq: int) -> Tensor:
    """Mean and biased variance ``[maps, 2, C]`` from what ``store_statistics`` wrote, ``parts [2, maps C, T]``."""
    _, rows, count = parts.shape
    channels = rows // maps
    stats = like.new_empty(maps, 2, channels, dtype=_launch.accumulate_in(like.dtype)[0])
    at = _launch.config("stage_statistics", stats)
    args = (parts, stats, rows, channels, positions, count)
    _launch.launch(like.device, stage_statistics_kernel, triton.cdiv(rows, at["BR"]), *args, BQ=bq, **at)
    return stats


@triton.jit
def stage_sums_kernel(p_parts, p_out, R, T, BR: tl.constexpr, BT: tl.constexpr):
    """``out[r] = sum_t parts[r, t]`` for R rows of T parts, in float64 and always in the same order.

    Grid: R / BR programs. Tile: BR rows by BT parts. Reads R T parts once, writes R numbers. Bound by its launch.
    """
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    to = p_out.dtype.element_ty
    b_out = sum_rows(p_parts, o_r, R, T, BR, BT)
    tl.store(p_out + o_r, b_out.to(tl.float32).to(to) if to != tl.float64 else b_out, mask=o_r < R)


def row_sums(parts: Tensor, like: Tensor) -> Tensor:
    """Row sums of ``parts`` ``[like.numel(), T]`` in the shape and dtype of ``like``."""
    out = like.new_empty(like.shape)
    rows, count = parts.shape
    at = _launch.config("stage_sums", out)
    _launch.launch(like.device, stage_sums_kernel, triton.cdiv(rows, at["BR"]), parts, out, rows, count, **at)
    return out


def new_parts(like: Tensor, *shape: int) -> Tensor:
    """Room for partial sums, float64."""
    return torch.empty(shape, dtype=torch.float64, device=like.device)
