"""The programs of ``conv_stage``; their launchers and the table that describes the parts: ``conv_stage.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from fastnas.kernels._stages import (
    pick,
    pick_number,
    row_of,
    store_statistics,
)

# Integers of a row of the table: those that describe a part, then the side of its depthwise kernel (0: none), where its
# weights start, where the pointwise ones do, and its output channels.
ROW = tl.constexpr(9)


@triton.jit
def _taps(
    p_x, x_pitch, p_norms, p_row, p_weights, o_q, o_c, C, Q, H, W, HO, WO, STRIDE: tl.constexpr, ACC: tl.constexpr
):
    """What the depthwise convolution of the part makes of relu(x) at outputs o_q [BQ], channels o_c: [BQ, BC]."""
    i_s, dilation, shift = tl.load(p_row), tl.load(p_row + 3), tl.load(p_row + 4)
    size, p_w = tl.load(p_row + 5), p_weights + tl.load(p_row + 6)
    side = tl.maximum(size, 1)
    o_h, o_w = o_q // WO % HO * STRIDE + shift, o_q % WO * STRIDE + shift
    image = (o_q // (HO * WO)).to(tl.int64) * H
    m = (o_q < Q)[:, None] & (o_c < C)[None, :]
    if p_norms is not None:
        b_mean, b_rstd = row_of(p_norms + i_s * 2 * C, o_c, C, ACC), row_of(p_norms + (i_s * 2 + 1) * C, o_c, C, ACC)
    b_a = tl.zeros((o_q.shape[0], o_c.shape[0]), ACC)
    t = 0
    while t < side * side:
        h, w = o_h + (t // side - side // 2) * dilation, o_w + (t % side - side // 2) * dilation
        inside = m & ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
        at = ((image + h) * W + w)[:, None] * x_pitch + o_c[None, :]
        b_w = tl.load(p_w + o_c * side * side + t, mask=(o_c < C) & (size > 0), other=0.0).to(ACC)
        b_w = tl.where(size > 0, b_w, 1.0)
        b_x = tl.load(p_x + at, mask=inside, other=0.0).to(ACC)
        if p_norms is not None:
            b_x = (b_x - b_mean) * b_rstd
        b_x = tl.where(inside & ((b_x > 0) | (b_x != b_x)), b_x, 0.0)  # NaN stays
        b_a += b_w[None, :] * b_x
        t += 1
    return b_a


@triton.jit
def _dz(
    p_gs,
    p_zs,
    p_coef,
    g_pitches,
    z_pitches,
    p_row,
    o_q,
    o_o,
    O,  # noqa: E741
    Q,
    OUTPUTS: tl.constexpr,
    ACC: tl.constexpr,
):
    """``coef[0] g + coef[1] (z - coef[3]) + coef[2]`` of the part's output channels o_o at outputs o_q: [BQ, BO]."""
    i_n, first, count = tl.load(p_row + 1), tl.load(p_row + 2), tl.load(p_row + 8)
    m_o = o_o < count
    m = (o_q < Q)[:, None] & m_o[None, :]
    o_z = first + o_o
    p_g, p_z = pick(p_gs, i_n, OUTPUTS), pick(p_zs, i_n, OUTPUTS)
    o_g = o_q.to(tl.int64)[:, None] * pick_number(g_pitches, i_n, OUTPUTS) + o_z[None, :]
    b_g = tl.load(p_g + o_g, mask=m, other=0.0).to(ACC)
    o_at = o_q.to(tl.int64)[:, None] * pick_number(z_pitches, i_n, OUTPUTS) + o_z[None, :]
    b_z = tl.load(p_z + o_at, mask=m, other=0.0).to(ACC)
    p_c = p_coef + i_n * 4 * O + first
    b_dz = row_of(p_c, o_o, count, ACC) * b_g + row_of(p_c + 2 * O, o_o, count, ACC)
    b_dz += row_of(p_c + O, o_o, count, ACC) * (b_z - row_of(p_c + 3 * O, o_o, count, ACC))
    return tl.where(m, b_dz, 0.0)


@triton.jit
def conv_stage_fwd_kernel(
    p_xs,
    p_norms,
    p_table,
    p_weights,
    p_z,
    p_stats,
    x_pitches,
    C,
    O,  # noqa: E741
    Q,
    H,
    W,
    HO,
    WO,
    TO,
    rows,
    SOURCES: tl.constexpr,
    STRIDE: tl.constexpr,
    ACC: tl.constexpr,
    BQ: tl.constexpr,
    BC: tl.constexpr,
    BO: tl.constexpr,
):
    """``z[n, q, first + o] = sum_c pw[o, c] sum_t dw[c, t] relu(x)[the pixel of tap t for q, c]``, and its statistics.

    Grid: Q / BQ times O / BO times parts. Tile: BQ outputs by BO output channels, BC input channels at a time. Reads x
    from memory once a part and BO channels (k^2 times from the level 1 cache), writes z once. Bound by the issue of
    loads; for many channels by arithmetic outside of the tensor cores.
    """
    T = tl.cdiv(Q, BQ)
    i_t, i_o, i_p = tl.program_id(0) % T, tl.program_id(0) // T % TO, tl.program_id(0) // (T * TO)
    p_row = p_table + i_p * ROW
    i_s, i_n, first, count = tl.load(p_row), tl.load(p_row + 1), tl.load(p_row + 2), tl.load(p_row + 8)
    p_x, x_pitch = pick(p_xs, i_s, SOURCES), pick_number(x_pitches, i_s, SOURCES)
    p_pw = p_weights + tl.load(p_row + 7)
    o_q = i_t * BQ + tl.arange(0, BQ)
    o_o = i_o * BO + tl.arange(0, BO)
    b_z = tl.zeros((BQ, BO), ACC)
    start = 0
    while start < C:
        o_c = start + tl.arange(0, BC)
        b_a = _taps(p_x, x_pitch, p_norms, p_row, p_weights, o_q, o_c, C, Q, H, W, HO, WO, STRIDE, ACC)
        m_w = (o_c < C)[:, None] & (o_o < count)[None, :]
        b_w = tl.load(p_pw + o_o[None, :] * C + o_c[:, None], mask=m_w, other=0.0).to(ACC)  # [BC, BO]
        b_z = tl.dot(b_a, b_w, b_z, input_precision="ieee", out_dtype=ACC)
        start += BC
    m = (o_q < Q)[:, None] & (o_o < count)[None, :]
    o_z = (i_n.to(tl.int64) * Q + o_q)[:, None] * O + (first + o_o)[None, :]
    tl.store(p_z + o_z, b_z.to(p_z.dtype.element_ty), mask=m)
    if p_stats is not None:
        p_part = p_stats + (i_n * O + first + o_o).to(tl.int64) * T + i_t
        store_statistics(b_z, m, p_part, rows, o_o < count, T, tl.minimum(Q - i_t * BQ, BQ).to(ACC), ACC)


@triton.jit
def conv_stage_da_kernel(
    p_gs,
    p_zs,
    p_coef,
    p_table,
    p_weights,
    p_da,
    g_pitches,
    z_pitches,
    C,
    O,  # noqa: E741
    Q,
    OUTPUTS: tl.constexpr,
    ACC: tl.constexpr,
    BQ: tl.constexpr,
    BC: tl.constexpr,
    BO: tl.constexpr,
):
    """``da[p, q, c] = sum_o pw[o, c] dz[q, o]``: the gradient behind the depthwise convolution of part p.

    Grid: Q / BQ times C / BC times parts. Tile: BQ outputs by BC channels, BO output channels at a time. Reads g and z
    once a part and BC channels, writes da once. Bound by memory bandwidth up to about 64 channels.
    """
    T, TC = tl.cdiv(Q, BQ), tl.cdiv(C, BC)
    i_t, i_c, i_p = tl.program_id(0) % T, tl.program_id(0) // T % TC, tl.program_id(0) // (T * TC)
    p_row = p_table + i_p * ROW
    count, p_pw = tl.load(p_row + 8), p_weights + tl.load(p_row + 7)
    o_q = i_t * BQ + tl.arange(0, BQ)
    o_c = i_c * BC + tl.arange(0, BC)
    b_da = tl.zeros((BQ, BC), ACC)
    start = 0
    while start < count:
        o_o = start + tl.arange(0, BO)
        b_dz = _dz(p_gs, p_zs, p_coef, g_pitches, z_pitches, p_row, o_q, o_o, O, Q, OUTPUTS, ACC)
        m_w = (o_o < count)[:, None] & (o_c < C)[None, :]
        b_w = tl.load(p_pw + o_o[:, None] * C + o_c[None, :], mask=m_w, other=0.0).to(ACC)  # [BO, BC]
        b_da = tl.dot(b_dz, b_w, b_da, input_precision="ieee", out_dtype=ACC)
        start += BO
    m = (o_q < Q)[:, None] & (o_c < C)[None, :]
    tl.store(p_da + (i_p.to(tl.int64) * Q + o_q)[:, None] * C + o_c[None, :], b_da.to(p_da.dtype.element_ty), mask=m)


@triton.jit
def conv_stage_dx_kernel(
    p_da,
    p_xs,
    p_norms,
    p_table,
    p_weights,
    p_base,
    p_dx,
    p_dots,
    x_pitches,
    base_pitch,
    C,
    Q,
    X,
    H,
    W,
    HO,
    WO,
    PARTS,
    SOURCES: tl.constexpr,
    STRIDE: tl.constexpr,
    ACC: tl.constexpr,
    BQ: tl.constexpr,
    BC: tl.constexpr,
):
    """``dx = [x > 0] sum_p sum_t dw[p, t] da[p, the output that tap t of the pixel feeds]``, plus ``base``.

    Grid: X / BQ times C / BC times sources, X pixels a source. Tile: BQ pixels by BC channels, the source's parts one
    after the other. Reads each da from memory once (k^2 times from the level 1 cache) and x once, writes dx once. With
    norms also the tile's sums of dx and of dx (x - mean). Bound by the issue of loads.
    """
    T, TC = tl.cdiv(X, BQ), tl.cdiv(C, BC)
    i_t, i_c, i_s = tl.program_id(0) % T, tl.program_id(0) // T % TC, tl.program_id(0) // (T * TC)
    o_c = i_c * BC + tl.arange(0, BC)
    o_x = i_t * BQ + tl.arange(0, BQ)
    m = (o_x < X)[:, None] & (o_c < C)[None, :]
    o_h, o_w = o_x // W % H, o_x % W
    image = (o_x // (H * W)).to(tl.int64) * HO
    b_dx = tl.zeros((BQ, BC), ACC)
    i_p = 0
    while i_p < PARTS:
        p_row = p_table + i_p * ROW
        dilation, shift, size = tl.load(p_row + 3), tl.load(p_row + 4), tl.load(p_row + 5)
        p_w = p_weights + tl.load(p_row + 6)
        side = tl.where(tl.load(p_row) == i_s, tl.maximum(size, 1), 0)  # no tap for the parts of other sources
        b_part = tl.zeros((BQ, BC), ACC)  # a sum of its own: long chains of additions lose precision
        t = 0
        while t < side * side:
            h = o_h - shift - (t // side - side // 2) * dilation
            w = o_w - shift - (t % side - side // 2) * dilation
            inside = (h >= 0) & (w >= 0) & (h % STRIDE == 0) & (w % STRIDE == 0)
            h, w = h // STRIDE, w // STRIDE
            inside = m & (inside & (h < HO) & (w < WO))[:, None]
            at = ((i_p * tl.cast(Q, tl.int64) + (image + h) * WO + w)[:, None]) * C + o_c[None, :]
            b_w = tl.load(p_w + o_c * side * side + t, mask=(o_c < C) & (size > 0), other=0.0).to(ACC)
            b_w = tl.where(size > 0, b_w, 1.0)
            b_part += b_w[None, :] * tl.load(p_da + at, mask=inside, other=0.0).to(ACC)
            t += 1
        b_dx += b_part
        i_p += 1
    p_x, x_pitch = pick(p_xs, i_s, SOURCES), pick_number(x_pitches, i_s, SOURCES)
    b_x = tl.load(p_x + o_x.to(tl.int64)[:, None] * x_pitch + o_c[None, :], mask=m, other=0.0).to(ACC)
    if p_norms is not None:
        b_x -= row_of(p_norms + i_s * 2 * C, o_c, C, ACC)  # its deviation is positive where the scaled one is
    b_dx = tl.where(m & ((b_x > 0) | (b_x != b_x)), b_dx, 0.0)
    if p_dots is not None:
        p_dot = p_dots + (i_s * 2 * C + o_c).to(tl.int64) * T + i_t  # [sources, 2, C, T]
        tl.store(p_dot, tl.sum(b_dx, 0).to(tl.float64), mask=o_c < C)
        tl.store(p_dot + tl.cast(C, tl.int64) * T, tl.sum(b_dx * b_x, 0).to(tl.float64), mask=o_c < C)
    if p_base is not None:
        o_base = o_x.to(tl.int64)[:, None] * base_pitch + o_c[None, :]
        b_dx += tl.load(p_base + o_base, mask=m, other=0.0).to(ACC)
    o_dx = (i_s.to(tl.int64) * X + o_x)[:, None] * C + o_c[None, :]
    tl.store(p_dx + o_dx, b_dx.to(p_dx.dtype.element_ty), mask=m)


@triton.jit
def conv_stage_dpw_kernel(
    p_xs,
    p_gs,
    p_zs,
    p_coef,
    p_norms,
    p_table,
    p_weights,
    p_parts,
    x_pitches,
    g_pitches,
    z_pitches,
    C,
    O,  # noqa: E741
    Q,
    H,
    W,
    HO,
    WO,
    CHUNKS,
    TILES,
    TO,
    SOURCES: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STRIDE: tl.constexpr,
    ACC: tl.constexpr,
    BQ: tl.constexpr,
    BC: tl.constexpr,
    BO: tl.constexpr,
):
    """``parts[pointwise weight (o, c) of part p, chunk] = sum_q dz[q, o] a[q, c]``, a computed again.

    Grid: chunks of TILES tiles of BQ outputs, times C / BC, O / BO and parts. Tile: BO by BC weights, BQ outputs at a
    time. Reads g, z and x once a tile of weights, writes a number a weight and chunk. Bound by the issue of loads.
    """
    TC = tl.cdiv(C, BC)
    i_k, i_c = tl.program_id(0) % CHUNKS, tl.program_id(0) // CHUNKS % TC
    i_o, i_p = tl.program_id(0) // (CHUNKS * TC) % TO, tl.program_id(0) // (CHUNKS * TC * TO)
    p_row = p_table + i_p * ROW
    i_s, count = tl.load(p_row), tl.load(p_row + 8)
    p_x, x_pitch = pick(p_xs, i_s, SOURCES), pick_number(x_pitches, i_s, SOURCES)
    o_c = i_c * BC + tl.arange(0, BC)
    o_o = i_o * BO + tl.arange(0, BO)
    b_dw = tl.zeros((BO, BC), ACC)
    n = 0
    while n < TILES:
        o_q = (i_k * TILES + n) * BQ + tl.arange(0, BQ)
        b_a = _taps(p_x, x_pitch, p_norms, p_row, p_weights, o_q, o_c, C, Q, H, W, HO, WO, STRIDE, ACC)
        b_dz = _dz(p_gs, p_zs, p_coef, g_pitches, z_pitches, p_row, o_q, o_o, O, Q, OUTPUTS, ACC)
        b_dw = tl.dot(tl.trans(b_dz), b_a, b_dw, input_precision="ieee", out_dtype=ACC)
        n += 1
    m = (o_o < count)[:, None] & (o_c < C)[None, :]
    o_w = tl.load(p_row + 7) + o_o[:, None] * C + o_c[None, :]
    tl.store(p_parts + o_w.to(tl.int64) * CHUNKS + i_k, b_dw.to(tl.float64), mask=m)


@triton.jit
def conv_stage_ddw_kernel(
    p_da,
    p_xs,
    p_norms,
    p_table,
    p_parts,
    x_pitches,
    C,
    Q,
    H,
    W,
    HO,
    WO,
    CHUNKS,
    TILES,
    SOURCES: tl.constexpr,
    STRIDE: tl.constexpr,
    ACC: tl.constexpr,
    BQ: tl.constexpr,
    BC: tl.constexpr,
):
    """``parts[depthwise weight (c, t) of part p, chunk] = sum_q da[q, c] relu(x)[the pixel of tap t for q, c]``.

    Grid: chunks of TILES tiles of BQ outputs, times C / BC and parts. Tile: BQ outputs by BC channels; tap by tap over
    the chunk, which stays in the cache. Reads da and x from memory once, writes a number a weight and chunk. Bound by
    the issue of loads: two a multiply-add.
    """
    TC = tl.cdiv(C, BC)
    i_k, i_c = tl.program_id(0) % CHUNKS, tl.program_id(0) // CHUNKS % TC
    i_p = tl.program_id(0) // (CHUNKS * TC)
    p_row = p_table + i_p * ROW
    i_s, dilation, side = tl.load(p_row), tl.load(p_row + 3), tl.load(p_row + 5)
    p_x, x_pitch = pick(p_xs, i_s, SOURCES), pick_number(x_pitches, i_s, SOURCES)
    o_c = i_c * BC + tl.arange(0, BC)
    if p_norms is not None:
        b_mean, b_rstd = row_of(p_norms + i_s * 2 * C, o_c, C, ACC), row_of(p_norms + (i_s * 2 + 1) * C, o_c, C, ACC)
    t = 0
    while t < side * side:
        dh, dw = (t // side - side // 2) * dilation, (t % side - side // 2) * dilation
        b_dw = tl.zeros((BQ, BC), ACC)
        n = 0
        while n < TILES:
            o_q = (i_k * TILES + n) * BQ + tl.arange(0, BQ)
            m = (o_q < Q)[:, None] & (o_c < C)[None, :]
            h, w = o_q // WO % HO * STRIDE + dh, o_q % WO * STRIDE + dw
            inside = m & ((h >= 0) & (h < H) & (w >= 0) & (w < W))[:, None]
            at = (((o_q // (HO * WO)).to(tl.int64) * H + h) * W + w)[:, None] * x_pitch + o_c[None, :]
            o_da = (i_p.to(tl.int64) * Q + o_q)[:, None] * C + o_c[None, :]
            b_da = tl.load(p_da + o_da, mask=m, other=0.0).to(ACC)
            b_x = tl.load(p_x + at, mask=inside, other=0.0).to(ACC)
            if p_norms is not None:
                b_x = (b_x - b_mean) * b_rstd
            b_x = tl.where(inside & ((b_x > 0) | (b_x != b_x)), b_x, 0.0)  # NaN stays
            b_dw += b_da * b_x
            n += 1
        o_w = tl.load(p_row + 6) + o_c * side * side + t
        tl.store(p_parts + o_w.to(tl.int64) * CHUNKS + i_k, tl.sum(b_dw.to(tl.float64), 0), mask=o_c < C)
        t += 1
