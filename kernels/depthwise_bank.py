"""Triton kernels of ``depthwise_bank``: depthwise convolutions and 3x3 pools of one input, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnas._layout import empty_map
from fastnas.kernels._launch import accumulate_in, config, laid_out_as, launch, ordered_sum, planes, tile
from fastnas.kernels._maps import image_tile, pixels, takes_over, window_count


@triton.jit
def depthwise_bank_fwd_kernel(
    p_x,
    p_ws,
    p_ys,
    C,
    H,
    W,
    P,
    WO,
    x_b,
    x_c,
    x_h,
    x_w,
    y_b,
    y_c,
    y_p,
    SIZES: tl.constexpr,
    DILATIONS: tl.constexpr,
    N: tl.constexpr,
    STRIDE: tl.constexpr,
    RELU: tl.constexpr,
    MAX: tl.constexpr,
    AVG: tl.constexpr,
    ACC: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
):
    """``y_i[b, c, h, w] = sum_t w_i[c, t] relu(x)[b, c, s h + d_i (t // k_i) - p_i, s w + d_i (t % k_i) - p_i]``.

    After the N convolutions come the maximum and the average of the 3x3 windows of x, where asked for.

    Grid: B times C / BC times P / BP programs. Tile: BC channels by BP output pixels, one image; the branches one after
    the other, so that one accumulator is alive. Reads x from memory once (k^2 times from the level 1 cache), writes
    each y once. Bound by the issue of loads: one a tap, where memory would allow three times as many taps.
    """
    i_b, o_c, o_p, m = image_tile(C, P, BC, BP)
    o_h, o_w = o_p // WO * STRIDE, o_p % WO * STRIDE
    p_in = p_x + i_b * x_b + o_c[:, None] * x_c  # [BC, 1]
    o_y = i_b * y_b + o_c[:, None] * y_c + o_p[None, :] * y_p
    for i in tl.static_range(N):
        b_y = tl.zeros((BC, BP), ACC)
        for t in range(SIZES[i] * SIZES[i]):
            h = o_h + (t // SIZES[i] - SIZES[i] // 2) * DILATIONS[i]
            w = o_w + (t % SIZES[i] - SIZES[i] // 2) * DILATIONS[i]
            b_x = pixels(p_in, h, w, H, W, x_h, x_w, m, 0.0, ACC)  # [BC, BP]
            if RELU:
                b_x = tl.where(b_x <= 0, 0.0, b_x)  # NaN stays
            b_w = tl.load(p_ws[i] + o_c * (SIZES[i] * SIZES[i]) + t, mask=o_c < C, other=0.0).to(ACC)  # [BC]
            b_y += b_w[:, None] * b_x
        tl.store(p_ys[i] + o_y, b_y.to(p_x.dtype.element_ty), mask=m)
    if MAX:
        b_y = tl.full((BC, BP), float("-inf"), ACC)
        for t in range(9):
            b_x = pixels(p_in, o_h + t // 3 - 1, o_w + t % 3 - 1, H, W, x_h, x_w, m, float("-inf"), ACC)
            b_y = tl.where(takes_over(b_x, b_y), b_x, b_y)
        tl.store(p_ys[N] + o_y, b_y.to(p_x.dtype.element_ty), mask=m)
    if AVG:
        b_y = tl.zeros((BC, BP), ACC)
        for t in range(9):
            b_y += pixels(p_in, o_h + t // 3 - 1, o_w + t % 3 - 1, H, W, x_h, x_w, m, 0.0, ACC)
        b_y = b_y / window_count(o_h, o_w, H, W).to(ACC)[None, :]
        tl.store(p_ys[N + MAX] + o_y, b_y.to(p_x.dtype.element_ty), mask=m)


@triton.jit
def depthwise_bank_places_kernel(
    p_x,
    p_places,
    C,
    H,
    W,
    P,
    WO,
    x_b,
    x_c,
    x_h,
    x_w,
    y_b,
    y_c,
    y_p,
    STRIDE: tl.constexpr,
    ACC: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
):
    """Which of its nine pixels each 3x3 window takes as maximum: the first of equals, the last NaN, as max_pool2d.

    Grid and tile as forward. Reads x once, writes a byte an output.
    """
    i_b, o_c, o_p, m = image_tile(C, P, BC, BP)
    o_h, o_w = o_p // WO * STRIDE, o_p % WO * STRIDE
    p_in = p_x + i_b * x_b + o_c[:, None] * x_c  # [BC, 1]
    b_best = tl.full((BC, BP), float("-inf"), ACC)
    first = tl.where(o_h == 0, 3, 0) + tl.where(o_w == 0, 1, 0)  # for windows of nothing but -inf
    b_at = tl.zeros((BC, BP), tl.int32) + first[None, :]
    for t in range(9):
        b_x = pixels(p_in, o_h + t // 3 - 1, o_w + t % 3 - 1, H, W, x_h, x_w, m, float("-inf"), ACC)
        takes = takes_over(b_x, b_best)
        b_at = tl.where(takes, t, b_at)
        b_best = tl.where(takes, b_x, b_best)
    tl.store(p_places + i_b * y_b + o_c[:, None] * y_c + o_p[None, :] * y_p, b_at.to(tl.int8), mask=m)


@triton.jit
def depthwise_bank_dx_kernel(
    p_gs,
    p_x,
    p_ws,
    p_places,
    p_dx,
    C,
    P,
    W,
    HO,
    WO,
    x_b,
    x_c,
    x_h,
    x_w,
    g_b,
    g_c,
    g_p,
    dx_b,
    dx_c,
    dx_p,
    SIZES: tl.constexpr,
    DILATIONS: tl.constexpr,
    N: tl.constexpr,
    STRIDE: tl.constexpr,
    RELU: tl.constexpr,
    MAX: tl.constexpr,
    AVG: tl.constexpr,
    ACC: tl.constexpr,
    BC: tl.constexpr,
    BP: tl.constexpr,
):
    """``dx = [x > 0] sum_i sum_t w_i[t] g_i[the output that tap t of pixel x feeds] + the pools' parts``.

    Grid: B times C / BC times P / BP programs. Tile: BC channels by BP pixels of x, one image. Reads
    each g from memory once (k^2 times from the level 1 cache) and x once, writes dx once. Bound by the issue of loads.
    """
    i_b, o_c, o_p, m = image_tile(C, P, BC, BP)
    o_h, o_w = o_p // W, o_p % W
    H = P // W
    g_h = WO * g_p
    o_g = i_b * g_b + o_c[:, None] * g_c  # [BC, 1]
    b_dx = tl.zeros((BC, BP), ACC)
    for i in tl.static_range(N):
        b_part = tl.zeros((BC, BP), ACC)  # a sum of its own: long chains of additions lose precision
        for t in range(SIZES[i] * SIZES[i]):
            h = o_h - (t // SIZES[i] - SIZES[i] // 2) * DILATIONS[i]
            w = o_w - (t % SIZES[i] - SIZES[i] // 2) * DILATIONS[i]
            m_t = m & ((h >= 0) & (w >= 0) & (h % STRIDE == 0) & (w % STRIDE == 0))[None, :]
            b_g = pixels(p_gs[i] + o_g, h // STRIDE, w // STRIDE, HO, WO, g_h, g_p, m_t, 0.0, ACC)  # [BC, BP]
            b_w = tl.load(p_ws[i] + o_c * (SIZES[i] * SIZES[i]) + t, mask=o_c < C, other=0.0).to(ACC)  # [BC]
            b_part += b_w[:, None] * b_g
        b_dx += b_part
    if RELU and N > 0:
        p_in = p_x + i_b * x_b + o_c[:, None] * x_c
        b_x = tl.load(p_in + (o_h.to(tl.int64) * x_h + o_w.to(tl.int64) * x_w)[None, :], mask=m, other=0.0).to(ACC)
        b_dx = tl.where(b_x <= 0, 0.0, b_dx)
    if MAX or AVG:
        b_part = tl.zeros((BC, BP), ACC)
        for t in range(9):
            h, w = o_h + 1 - t // 3, o_w + 1 - t % 3
            m_t = m & ((h >= 0) & (w >= 0) & (h % STRIDE == 0) & (w % STRIDE == 0))[None, :]
            h, w = h // STRIDE, w // STRIDE
            if MAX:
                b_at = pixels(p_places + o_g, h, w, HO, WO, g_h, g_p, m_t, -1, tl.int32)
                b_part += tl.where(b_at == t, pixels(p_gs[N] + o_g, h, w, HO, WO, g_h, g_p, m_t, 0.0, ACC), 0.0)
            if AVG:
                b_g = pixels(p_gs[N + MAX] + o_g, h, w, HO, WO, g_h, g_p, m_t, 0.0, ACC)
                b_part += b_g / window_count(h * STRIDE, w * STRIDE, H, W).to(ACC)[None, :]
        b_dx += b_part
    o_dx = i_b * dx_b + o_c[:, None] * dx_c + o_p[None, :] * dx_p
    tl.store(p_dx + o_dx, b_dx.to(p_dx.dtype.element_ty), mask=m)


@triton.jit
def depthwise_bank_dw_kernel(
    p_g,
    p_x,
    p_parts,
    C,
    H,
    W,
    Q,
    P,
    WO,
    x_b,
    x_c,
    x_h,
    x_w,
    g_b,
    g_c,
    g_p,
    SIZE: tl.constexpr,
    STEP: tl.constexpr,
    STRIDE: tl.constexpr,
    RELU: tl.constexpr,
    ACC: tl.constexpr,
    BC: tl.constexpr,
    BQ: tl.constexpr,
    TILES: tl.constexpr,
):
    """``parts[c, t, chunk] = sum_q g[c, q] relu(x)[c, the pixel of tap t for output q]`` for one branch.

    Position ``q = b P + p`` counts output pixel p of image b. Grid: C / BC times chunks of TILES tiles of BQ positions.
    Tile: BC channels by BQ positions; tap by tap over the chunk, which stays in the cache, so that a sum over threads
    is needed once a tap and chunk only. Reads g and x from memory once, writes k^2 numbers a channel and chunk. Bound
    by the issue of loads: two a multiply-add.
    """
    T = tl.cdiv(Q, BQ * TILES)
    i_t, i_c = tl.program_id(0) % T, tl.program_id(0) // T
    o_c = i_c.to(tl.int64) * BC + tl.arange(0, BC)
    for t in range(SIZE * SIZE):
        dh, dw = (t // SIZE - SIZE // 2) * STEP, (t % SIZE - SIZE // 2) * STEP
        b_dw = tl.zeros((BC, BQ), ACC)
        for n in range(TILES):
            o_q = (i_t * TILES + n) * BQ + tl.arange(0, BQ)
            m = (o_c < C)[:, None] & (o_q < Q)[None, :]
            o_b, o_p = (o_q // P).to(tl.int64), o_q % P
            o_h, o_w = o_p // WO * STRIDE + dh, o_p % WO * STRIDE + dw
            o_g = o_b[None, :] * g_b + o_c[:, None] * g_c + o_p[None, :] * g_p
            b_g = tl.load(p_g + o_g, mask=m, other=0.0).to(ACC)  # [BC, BQ]
            p_in = p_x + o_b[None, :] * x_b + o_c[:, None] * x_c
            b_x = pixels(p_in, o_h, o_w, H, W, x_h, x_w, m, 0.0, ACC)
            if RELU:
                b_x = tl.where(b_x <= 0, 0.0, b_x)
            b_dw += b_g * b_x
        b_sum = tl.sum(b_dw.to(tl.float64), 1)  # terms of both signs: what is left may be far smaller than they are
        tl.store(p_parts + (o_c * (SIZE * SIZE) + t) * T + i_t, b_sum, mask=o_c < C)


def depthwise_bank_fwd(
    x: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    stride: int,
    relu: bool,
    max_pool: bool,
    avg_pool: bool,
) -> list[Tensor]:
    """The convolutions' outputs, then the pools', in the layout of ``x``."""
    batch, channels, height, width = x.shape
    out = (-(-height // stride), -(-width // stride))
    ys = [empty_map(x, batch, channels, *out) for _ in range(len(weights) + max_pool + avg_pool)]
    if x.numel() == 0:
        return ys
    at = config("depthwise_bank_fwd", ys[0])
    programs, bc, bp = tile(ys[0], at.pop("BLOCK"))
    launch(
        x.device,
        depthwise_bank_fwd_kernel,
        programs,
        x,
        tuple(w.contiguous() for w in weights) or None,
        tuple(ys),
        channels,
        height,
        width,
        out[0] * out[1],
        out[1],
        *x.stride(),
        *planes(ys[0]),
        SIZES=tuple(w.shape[2] for w in weights),
        DILATIONS=tuple(dilations),
        N=len(weights),
        STRIDE=stride,
        RELU=relu,
        MAX=max_pool,
        AVG=avg_pool,
        ACC=accumulate_in(x.dtype)[1],
        BC=bc,
        BP=bp,
        **at,
    )
    return ys


def depthwise_bank_bwd(
    gs: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    stride: int,
    relu: bool,
    max_pool: bool,
    avg_pool: bool,
    x_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of x and of the weights; empty tensors for those that are not wanted."""
    dx = empty_map(x, *x.shape) if x_grad else x.new_empty(0)
    if x.numel() == 0:
        return dx, [w.new_zeros(w.shape if weight_grad else 0) for w in weights]
    like = empty_map(x, *gs[0].shape)  # gradients mostly come in the layout of the outputs
    gs = laid_out_as(like, gs)
    if x_grad:
        _input_gradient(gs, x, weights, dilations, stride, relu, max_pool, avg_pool, dx)
    if not weight_grad:
        return dx, [w.new_empty(0) for w in weights]
    branches = zip(gs, weights, dilations, strict=False)
    return dx, [_weight_gradient(g, planes(like), x, w, step, stride, relu) for g, w, step in branches]


def _input_gradient(
    gs: tuple[Tensor, ...],
    x: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    stride: int,
    relu: bool,
    max_pool: bool,
    avg_pool: bool,
    dx: Tensor,
) -> None:
    channels, height, width = x.shape[1:]
    out = gs[0].shape[2:]
    g_strides = planes(gs[0])
    acc = accumulate_in(x.dtype)[1]
    places = None
    if max_pool:
        places = torch.empty_strided(gs[0].shape, gs[0].stride(), dtype=torch.int8, device=x.device)
        at = config("depthwise_bank_places", places)
        programs, bc, bp = tile(places, at.pop("BLOCK"))
        args = (x, places, channels, height, width, out.numel(), out[1], *x.stride(), *g_strides)
        launch(x.device, depthwise_bank_places_kernel, programs, *args, STRIDE=stride, ACC=acc, BC=bc, BP=bp, **at)
    at = config("depthwise_bank_dx", dx)
    programs, bc, bp = tile(dx, at.pop("BLOCK"))
    launch(
        x.device,
        depthwise_bank_dx_kernel,
        programs,
        gs,
        x,
        tuple(w.contiguous() for w in weights) or None,
        places,
        dx,
        channels,
        height * width,
        width,
        *out,
        *x.stride(),
        *g_strides,
        *planes(dx),
        SIZES=tuple(w.shape[2] for w in weights),
        DILATIONS=tuple(dilations),
        N=len(weights),
        STRIDE=stride,
        RELU=relu,
        MAX=max_pool,
        AVG=avg_pool,
        ACC=acc,
        BC=bc,
        BP=bp,
        **at,
    )


def _weight_gradient(
    g: Tensor, g_strides: tuple[int, int, int], x: Tensor, w: Tensor, step: int, stride: int, relu: bool
) -> Tensor:
    channels, height, width = x.shape[1:]
    pixels = g.shape[2] * g.shape[3]
    positions = g.shape[0] * pixels
    at = config("depthwise_bank_dw", g)
    block = at.pop("BLOCK")
    bc = min(triton.next_power_of_2(channels), 64, block) if g_strides[1] == 1 and channels > 1 else 1
    bq = min(triton.next_power_of_2(positions), block // bc)
    tiles = min(at.pop("TILES"), triton.next_power_of_2(triton.cdiv(positions, bq)))
    chunks = triton.cdiv(positions, bq * tiles)
    size = w.shape[2]
    acc = accumulate_in(x.dtype)[1]
    parts = torch.empty((channels * size * size, chunks), dtype=torch.float64, device=x.device)
    where = (channels, height, width, positions, pixels, g.shape[3], *x.stride(), *g_strides)
    constants = {"SIZE": size, "STEP": step, "STRIDE": stride, "RELU": relu, "ACC": acc, "TILES": tiles}
    programs = chunks * triton.cdiv(channels, bc)
    launch(x.device, depthwise_bank_dw_kernel, programs, g, x, parts, *where, BC=bc, BQ=bq, **constants, **at)
    return ordered_sum(parts, w)
