"""What kernels that walk maps share: tiles of an image, pixels with a border, maxima and windows as torch has them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def image_tile(C, P, BC: tl.constexpr, BP: tl.constexpr):
    """Image, channels [BC], pixels [BP] and mask [BC, BP] of this program's tile of a ``[B, C, P]`` map."""
    TC, TP = tl.cdiv(C, BC), tl.cdiv(P, BP)
    i = tl.program_id(0)
    o_c = (i // TP % TC).to(tl.int64) * BC + tl.arange(0, BC)
    o_p = i % TP * BP + tl.arange(0, BP)
    return (i // (TP * TC)).to(tl.int64), o_c, o_p, (o_c < C)[:, None] & (o_p < P)[None, :]


@triton.jit
def pixels(p, o_h, o_w, H, W, s_h, s_w, m, other, ACC: tl.constexpr):
    """Pixels (o_h, o_w) [BP] of the planes ``p`` [BC, 1]; ``other`` outside the map."""
    inside = m & ((o_h >= 0) & (o_h < H) & (o_w >= 0) & (o_w < W))[None, :]
    return tl.load(p + (o_h.to(tl.int64) * s_h + o_w.to(tl.int64) * s_w)[None, :], mask=inside, other=other).to(ACC)


@triton.jit
def takes_over(b_x, b_max):
    """Whether ``b_x`` becomes the maximum after ``b_max``, as in max_pool2d: the first of equals stays, NaN wins."""
    return (b_x > b_max) | (b_x != b_x)


@triton.jit
def window_count(o_h, o_w, H, W):
    """Pixels inside the map of the 3x3 windows around (o_h, o_w), at least 1."""
    rows = tl.minimum(o_h + 2, H) - tl.maximum(o_h - 1, 0)
    columns = tl.minimum(o_w + 2, W) - tl.maximum(o_w - 1, 0)
    return tl.maximum(rows, 1) * tl.maximum(columns, 1)
