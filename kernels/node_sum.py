"""Triton kernels of ``node_sum``: the folded, weighted sum of a node's terms, and the sums its gradients need."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastnas.kernels._launch import launch
from fastnas.kernels._stages import (
    new_parts,
    pick,
    pick_number,
    pitch,
    pitches,
    position_tile,
    row_of,
    row_sums,
    tiles,
)


@triton.jit
def node_sum_kernel(
    p_terms,
    p_coef,
    p_out,
    pitches,
    out_pitch,
    C,
    Q,
    N: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ACC: tl.constexpr,
    BQ: tl.constexpr,
    BC: tl.constexpr,
):
    """``out = sum_n coef[n, 0] (terms[n] - coef[n, 1])``, on top of ``out`` with ACCUMULATE.

    Grid: Q / BQ times C / BC programs. Tile: BQ positions by BC channels. Reads every term once, writes out once: N + 1
    times C Q elements, one more with ACCUMULATE. Bound by memory bandwidth. ``out`` may be one of the terms.
    """
    _, o_q, o_c, m = position_tile(Q, C, BQ, BC)
    o_q = o_q.to(tl.int64)
    p_at = p_out + o_q[:, None] * out_pitch + o_c[None, :]
    b_out = tl.zeros((BQ, BC), ACC)
    if ACCUMULATE:
        b_out += tl.load(p_at, mask=m, other=0.0).to(ACC)
    for n in tl.static_range(N):
        b_scale = row_of(p_coef + 2 * n * C, o_c, C, ACC)
        b_mean = row_of(p_coef + (2 * n + 1) * C, o_c, C, ACC)
        b_term = tl.load(p_terms[n] + o_q[:, None] * pitches[n] + o_c[None, :], mask=m, other=0.0).to(ACC)  # [BQ, BC]
        b_out += b_scale * (b_term - b_mean)
    tl.store(p_at, b_out.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def node_dots_kernel(
    p_gs,
    p_terms,
    p_means,
    p_parts,
    g_pitches,
    pitches,
    C,
    Q,
    N: tl.constexpr,
    ACC: tl.constexpr,
    BQ: tl.constexpr,
    BC: tl.constexpr,
):
    """Sums over the tile's positions, by channel, of ``gs[n]`` and of ``gs[n] (terms[n] - means[n])``.

    Grid: Q / BQ times C / BC times N programs, one a term, so that a long list costs no registers. Tile: BQ positions
    by BC channels. Reads g and the term once (a shared g again from the cache), writes 2 numbers a channel. Bound by
    memory bandwidth.
    """
    T, TC = tl.cdiv(Q, BQ), tl.cdiv(C, BC)
    i_t, i_c, i_n = tl.program_id(0) % T, tl.program_id(0) // T % TC, tl.program_id(0) // (T * TC)
    o_c = i_c * BC + tl.arange(0, BC)
    o_q = (i_t * BQ + tl.arange(0, BQ)).to(tl.int64)
    m = (o_q < Q)[:, None] & (o_c < C)[None, :]
    p_g, p_term = pick(p_gs, i_n, N), pick(p_terms, i_n, N)
    b_g = tl.load(p_g + o_q[:, None] * pick_number(g_pitches, i_n, N) + o_c[None, :], mask=m, other=0.0).to(ACC)
    b_y = tl.load(p_term + o_q[:, None] * pick_number(pitches, i_n, N) + o_c[None, :], mask=m, other=0.0).to(ACC)
    b_mean = row_of(p_means + i_n * C, o_c, C, ACC)
    p_part = p_parts + (i_n * 2 * C + o_c).to(tl.int64) * T + i_t  # [N, 2, C, T]
    tl.store(p_part, tl.sum(b_g, 0).to(tl.float64), mask=o_c < C)
    tl.store(p_part + tl.cast(C, tl.int64) * T, tl.sum(b_g * (b_y - b_mean), 0).to(tl.float64), mask=o_c < C)


def node_sum(out: Tensor, terms: Sequence[Tensor], coef: Tensor, accumulate: bool) -> None:
    """Writes ``out``, or adds to it."""
    if out.numel() == 0:
        return
    channels = out.shape[-1]
    rows, columns, at = tiles("node_sum", out, channels)
    args = (tuple(terms), coef.contiguous(), out, pitches(terms), pitch(out), channels, out.numel() // channels)
    launch(out.device, node_sum_kernel, rows * columns, *args, N=len(terms), ACCUMULATE=accumulate, **at)


def node_dots(gs: Sequence[Tensor], terms: Sequence[Tensor], means: Tensor) -> Tensor:
    """``[N, 2, C]``: sums of g, and of g times the term's deviation from its mean."""
    count, channels = means.shape
    like = means.new_empty(count, 2, channels)
    if terms[0].numel() == 0:
        return like.zero_()
    rows, columns, at = tiles("node_dots", terms[0], channels)
    parts = new_parts(means, like.numel(), rows)
    positions = terms[0].numel() // channels
    args = (tuple(gs), tuple(terms), means.contiguous(), parts, pitches(gs), pitches(terms), channels, positions)
    launch(means.device, node_dots_kernel, rows * columns * count, *args, N=count, **at)
    return row_sums(parts, like)
