"""Triton kernels of ``mixed_sum``: a weighted sum of K maps and its gradients, each in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastnas.kernels._launch import accumulate_in, config, laid_out_as, launch, ordered_sum


@triton.jit
def mixed_sum_fwd_kernel(p_xs, p_w, p_y, N, K: tl.constexpr, ACC: tl.constexpr, BN: tl.constexpr):
    """``y[n] = sum_k w[k] x_k[n]``.

    Grid: N / BN programs over the flat map. Tile: BN elements, the K maps one after the other. Each x is read once, y
    written once: (K + 1) N elements. Bound by memory bandwidth: one multiply-add an element read.
    """
    first = tl.program_id(0).to(tl.int64) * BN
    o_n = tl.arange(0, BN)
    m_n = first + o_n < N
    b_y = tl.zeros((BN,), ACC)
    for k in tl.static_range(K):
        b_x = tl.load(p_xs[k] + first + o_n, mask=m_n, other=0.0).to(ACC)  # [BN]
        b_y += tl.load(p_w + k).to(ACC) * b_x
    tl.store(p_y + first + o_n, b_y.to(p_y.dtype.element_ty), mask=m_n)


@triton.jit
def mixed_sum_bwd_kernel(p_g, p_xs, p_w, p_dxs, p_parts, N, K: tl.constexpr, ACC: tl.constexpr, BN: tl.constexpr):
    """``dx_k[n] = w[k] g[n]`` and ``parts[k, program] = sum_n g[n] x_k[n]`` over the program's tile.

    Grid: N / BN programs. Tile: BN elements of g, kept in registers while the K maps pass. Reads g and each x once,
    writes each dx once: (2 K + 1) N elements, and K numbers a program. Bound by memory bandwidth.
    """
    i_n = tl.program_id(0)
    first = i_n.to(tl.int64) * BN
    o_n = tl.arange(0, BN)
    m_n = first + o_n < N
    b_g = tl.load(p_g + first + o_n, mask=m_n, other=0.0).to(ACC)  # [BN]
    for k in tl.static_range(K):
        b_x = tl.load(p_xs[k] + first + o_n, mask=m_n, other=0.0).to(ACC)  # [BN]
        b_dx = tl.load(p_w + k).to(ACC) * b_g
        tl.store(p_dxs[k] + first + o_n, b_dx.to(p_g.dtype.element_ty), mask=m_n)
        tl.store(p_parts + k * tl.num_programs(0).to(tl.int64) + i_n, tl.sum(b_g * b_x))


@triton.jit
def mixed_sum_bwd_xs_kernel(p_g, p_w, p_dxs, N, K: tl.constexpr, ACC: tl.constexpr, BN: tl.constexpr):
    """``dx_k[n] = w[k] g[n]``.

    Grid: N / BN programs. Tile: BN elements. Reads g once, writes each dx once: (K + 1) N elements. Bound by memory
    bandwidth.
    """
    first = tl.program_id(0).to(tl.int64) * BN
    o_n = tl.arange(0, BN)
    m_n = first + o_n < N
    b_g = tl.load(p_g + first + o_n, mask=m_n, other=0.0).to(ACC)  # [BN]
    for k in tl.static_range(K):
        b_dx = tl.load(p_w + k).to(ACC) * b_g
        tl.store(p_dxs[k] + first + o_n, b_dx.to(p_g.dtype.element_ty), mask=m_n)


def mixed_sum_fwd(xs: Sequence[Tensor], w: Tensor) -> Tensor:
    """``y`` in the layout of ``empty_like(xs[0])``."""
    y = torch.empty_like(xs[0])
    if y.numel() == 0:
        return y
    at = config("mixed_sum_fwd", y)
    _, acc = accumulate_in(y.dtype)
    programs = triton.cdiv(y.numel(), at["BN"])
    xs = laid_out_as(y, xs)
    launch(y.device, mixed_sum_fwd_kernel, programs, xs, w.contiguous(), y, y.numel(), K=len(xs), ACC=acc, **at)
    return y


def mixed_sum_bwd(g: Tensor, xs: Sequence[Tensor], w: Tensor) -> tuple[list[Tensor], Tensor]:
    """Gradients of all ``xs``, in the layout of ``empty_like(xs[0])``, and of ``w``, in the shape of ``w``."""
    dxs = [torch.empty_like(xs[0]) for _ in xs]
    count = g.numel()
    if count == 0:
        return dxs, torch.zeros_like(w, memory_format=torch.contiguous_format)
    at = config("mixed_sum_bwd", dxs[0])
    sums, acc = accumulate_in(g.dtype)
    programs = triton.cdiv(count, at["BN"])
    parts = torch.empty((len(xs), programs), dtype=sums, device=g.device)
    g, *xs = laid_out_as(dxs[0], (g, *xs))
    args = (g, tuple(xs), w.contiguous(), tuple(dxs), parts, count)
    launch(g.device, mixed_sum_bwd_kernel, programs, *args, K=len(xs), ACC=acc, **at)
    return dxs, ordered_sum(parts, w)


def mixed_sum_bwd_xs(g: Tensor, w: Tensor) -> list[Tensor]:
    """Gradients of all ``xs``, in the layout of ``empty_like(g)``."""
    dxs = [torch.empty_like(g) for _ in range(w.numel())]
    if g.numel() == 0 or not dxs:
        return dxs
    at = config("mixed_sum_bwd_xs", dxs[0])
    _, acc = accumulate_in(g.dtype)
    programs = triton.cdiv(g.numel(), at["BN"])
    (g,) = laid_out_as(dxs[0], (g,))
    args = (g, w.contiguous(), tuple(dxs), g.numel())
    launch(g.device, mixed_sum_bwd_xs_kernel, programs, *args, K=len(dxs), ACC=acc, **at)
    return dxs
