"""Triton kernels of ``gumbel_softmax``: noise, temperature and softmax of many rows in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnas.kernels._launch import accumulate_in, config, float_bits, launch


@triton.jit
def _log_positive(x):
    """Logarithm of a normal positive x, to about one unit in the last place.

    The hardware's float32 logarithm has an absolute error near 1e-7, which is all of ``log u`` for u next to 1 and can
    turn it positive. With x = 2^e m, m in [sqrt(1/2), sqrt(2)), f = m - 1 and s = f / (2 + f), log m = 2 atanh s is a
    short series; 2 s = f - f^2/2 + s f^2/2 keeps its leading f exact.
    """
    if x.dtype == tl.float64:
        return tl.log(x)
    else:
        shifted = x.to(tl.int32, bitcast=True) - 0x3F3504F3  # sqrt(1/2)
        e = (shifted >> 23).to(tl.float32)
        f = ((shifted & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
        s = f / (2.0 + f)
        z = s * s
        half = 0.5 * f * f
        r = z * (0.6666666666666666 + z * (0.4 + z * (0.2857142857142857 + z * (0.2222222222222222 + z * 0.18181818))))
        # e * 0.693145751953125 is exact; the rest of ln 2 follows.
        return e * 0.693145751953125 + (f - (half - (s * (half + r) + e * 1.428606765330187e-06)))


@triton.jit
def _scores(p_x, p_seed, p_tau, seed, tau_bits, R, C, ACC: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """``(logits + noise - largest of the row) / tau`` of one tile [BR, BC], its offsets, its mask, and tau.

    Element i takes word i % 4 of the Philox4x32-10 block with counter i // 4 and key seed. Each thread draws a whole
    block for its word: a row need not start at a block. ``tau`` comes as the bits of a float64, because Triton would
    round a float argument to float32.
    """
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    m = (o_r < R)[:, None] & m_c[None, :]
    o = o_r[:, None] * C + o_c[None, :]
    key = seed.to(tl.int64) if p_seed is None else tl.load(p_seed)
    tau = tau_bits.to(tl.int64).to(tl.float64, bitcast=True).to(ACC) if p_tau is None else tl.load(p_tau).to(ACC)
    block = o // 4
    low, high = (block & 0xFFFFFFFF).to(tl.uint32), (block >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(key, low, high, low * 0, low * 0)
    word = o % 4
    bits = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    u = ((bits >> 9).to(ACC) + 0.5) * 1.1920928955078125e-07  # 2^-23: u in [2^-24, 1 - 2^-24]
    noise = -_log_positive(-_log_positive(u))
    b_x = tl.load(p_x + o, mask=m, other=0.0).to(ACC)  # [BR, BC]
    # Rows beyond the end hold zeros, so that only the columns beyond the end are -inf.
    b_a = tl.where(m_c[None, :], b_x + noise, float("-inf"))
    return (b_a - tl.max(b_a, 1)[:, None]) / tau, o, m, tau


@triton.jit(do_not_specialize=["seed", "tau_bits"])
def gumbel_softmax_fwd_kernel(
    p_x,
    p_seed,
    p_tau,
    p_y,
    seed,
    tau_bits,
    R,
    C,
    HARD: tl.constexpr,
    ACC: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    """``y = softmax((x + noise) / tau)`` of R rows of C choices, or the one-hot of each row's first largest entry.

    Grid: R / BR programs. Tile: BR whole rows, padded to BC columns. Reads x once, writes y once: 2 R C elements. In a
    supernet all of it is a few kilobytes, and the launch is what it costs.
    """
    b_a, o, m, _ = _scores(p_x, p_seed, p_tau, seed, tau_bits, R, C, ACC, BR, BC)
    if HARD:
        o_c = tl.arange(0, BC)[None, :]
        first = tl.min(tl.where(b_a == 0.0, o_c, BC), 1)  # [BR]
        # A row with a NaN is all NaN, as its softmax would be.
        b_nan = tl.sum(tl.where(b_a != b_a, b_a, 0.0), 1)
        b_y = tl.where(o_c == first[:, None], 1.0, 0.0) + b_nan[:, None]
    else:
        b_e = tl.exp(b_a)  # 0 in the columns beyond the end
        b_y = b_e / tl.sum(b_e, 1)[:, None]
    tl.store(p_y + o, b_y.to(p_y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["seed", "tau_bits"])
def gumbel_softmax_bwd_kernel(
    p_g, p_x, p_seed, p_tau, p_dx, seed, tau_bits, R, C, ACC: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr
):
    """``dx = y (g - sum y g) / tau``, with y drawn again from the same seed.

    Grid and tile as forward. Reads x and g once, writes dx once: 3 R C elements. Bound by its launch.
    """
    b_a, o, m, tau = _scores(p_x, p_seed, p_tau, seed, tau_bits, R, C, ACC, BR, BC)
    b_e = tl.exp(b_a)  # 0 in the columns beyond the end
    b_y = b_e / tl.sum(b_e, 1)[:, None]
    b_g = tl.load(p_g + o, mask=m, other=0.0).to(ACC)  # [BR, BC]
    b_dx = b_y * (b_g - tl.sum(b_y * b_g, 1)[:, None]) / tau
    tl.store(p_dx + o, b_dx.to(p_dx.dtype.element_ty), mask=m)


def _rows(kernel: str, x: Tensor) -> tuple[int, int, dict[str, int]]:
    """Rows, programs and constants for the contiguous logits ``x``."""
    at = config(kernel, x)
    choices = x.shape[-1]
    rows = x.numel() // choices
    bc = triton.next_power_of_2(choices)
    br = min(max(1, at.pop("BLOCK") // bc), triton.next_power_of_2(rows))
    if "num_warps" in at:  # long rows: at most 16 elements a thread, as far as there are threads
        at["num_warps"] = min(32, max(at["num_warps"], bc // 512))
    return rows, triton.cdiv(rows, br), {"BR": br, "BC": bc, **at}


def gumbel_softmax_fwd(
    logits: Tensor, seed: int, tau: float, seed_tensor: Tensor | None, tau_tensor: Tensor | None, hard: bool
) -> Tensor:
    """Samples of all rows; contiguous."""
    x = logits.contiguous()
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    rows, programs, at = _rows("gumbel_softmax_fwd", x)
    _, acc = accumulate_in(x.dtype)
    args = (x, seed_tensor, tau_tensor, y, seed, float_bits(tau), rows, x.shape[-1])
    launch(x.device, gumbel_softmax_fwd_kernel, programs, *args, HARD=hard, ACC=acc, **at)
    return y


def gumbel_softmax_bwd(
    g: Tensor,
    logits: Tensor,
    seed: int,
    tau: float,
    seed_tensor: Tensor | None,
    tau_tensor: Tensor | None,
    y: Tensor | None,
) -> Tensor:
    """Gradient of the logits; contiguous. A sample ``y`` that was kept is not read: drawing it again costs nothing."""
    x = logits.contiguous()
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx
    rows, programs, at = _rows("gumbel_softmax_bwd", x)
    _, acc = accumulate_in(x.dtype)
    args = (g.contiguous(), x, seed_tensor, tau_tensor, dx, seed, float_bits(tau), rows, x.shape[-1])
    launch(x.device, gumbel_softmax_bwd_kernel, programs, *args, ACC=acc, **at)
    return dx
