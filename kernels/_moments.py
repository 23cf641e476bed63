"""Sums, means and variances of rows from those of their tiles, in float64."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_rows(p_parts, o_r, R, T, BR: tl.constexpr, BT: tl.constexpr):
    """Sums [BR] of the rows o_r of ``parts [R, T]``, always added in the same order."""
    o_t = tl.arange(0, BT)
    b_sum = tl.zeros((BR, BT), tl.float64)
    start = 0
    while start < T:
        m = (o_r < R)[:, None] & (start + o_t < T)[None, :]
        b_sum += tl.load(p_parts + o_r[:, None] * T + start + o_t[None, :], mask=m, other=0.0).to(tl.float64)
        start += BT
    return tl.sum(b_sum, 1)


@triton.jit
def combine_moments(p_parts, o_r, R, Q, T, BQ: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr):
    """Mean and biased variance [BR], in float64, of rows o_r of R, from T tiles of BQ of their Q positions each, the
    last one shorter. ``parts [2, R, T]``: mean and sum of squares around it.

    ``mean = sum_t n_t mean_t / Q`` and ``var = sum_t (M2_t + n_t (mean_t - mean)^2) / Q`` (Chan et al. 1979).
    """
    o_t = tl.arange(0, BT)
    p_row = p_parts + o_r[:, None] * T + o_t[None, :]
    b_sum = tl.zeros((BR, BT), tl.float64)
    start = 0
    while start < T:
        m = (o_r < R)[:, None] & (start + o_t < T)[None, :]
        b_n = tl.minimum(Q - (start + o_t).to(tl.int64) * BQ, BQ).to(tl.float64)[None, :]
        b_sum += tl.load(p_row + start, mask=m, other=0.0) * b_n
        start += BT
    b_mean = tl.sum(b_sum, 1) / Q  # [BR]
    b_m2 = tl.zeros((BR, BT), tl.float64)
    start = 0
    while start < T:
        m = (o_r < R)[:, None] & (start + o_t < T)[None, :]
        b_n = tl.minimum(Q - (start + o_t).to(tl.int64) * BQ, BQ).to(tl.float64)[None, :]
        b_off = tl.load(p_row + start, mask=m, other=0.0) - b_mean[:, None]
        b_m2 += tl.load(p_row + tl.cast(R, tl.int64) * T + start, mask=m, other=0.0)
        b_m2 += tl.where(m, b_n * b_off * b_off, 0.0)
        start += BT
    return b_mean, tl.sum(b_m2, 1) / Q
