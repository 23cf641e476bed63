"""Depthwise convolutions and pools that share one input: one ReLU, one read, one backward pass for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastnas import _backends
from fastnas._layout import empty_map, map_in_layout_of
from fastnas.ops._checks import check_floating, check_list
from fastnas.ops._library import define
from fastnas.reference.depthwise_bank import depthwise_bank as _reference

_OP = "depthwise_bank"


def _fwd_reference(
    x: Tensor, weights: list[Tensor], dilations: list[int], stride: int, relu: bool, max_pool: bool, avg_pool: bool
) -> list[Tensor]:
    ys = _reference(x, weights, dilations, stride=stride, relu=relu, max_pool=max_pool, avg_pool=avg_pool)
    return [map_in_layout_of(y, x) for y in ys]


def _fwd_fake(
    x: Tensor, weights: list[Tensor], dilations: list[int], stride: int, relu: bool, max_pool: bool, avg_pool: bool
) -> list[Tensor]:
    height, width = ((size + stride - 1) // stride for size in x.shape[2:])
    return [empty_map(x, *x.shape[:2], height, width) for _ in range(len(weights) + max_pool + avg_pool)]


def _gradients(
    gs: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    branches: _Branches,
    x_grad: bool,
    weight_grad: Sequence[bool],
    create_graph: bool = False,
) -> list[Tensor | None]:
    """Gradients of x and of each weight by PyTorch's own autograd; None where none is asked for."""
    asked = [x_grad, *weight_grad]
    with torch.enable_grad():
        leaves = [x, *weights]
        if not create_graph:
            leaves = [t.detach().requires_grad_(need) for t, need in zip(leaves, asked, strict=True)]
        # Without x_grad, the pools and the convolutions whose weights are frozen lead nowhere.
        pairs = zip(branches.reference(leaves[0], leaves[1:]), gs, strict=True)
        ys, gs = zip(*((y, g) for y, g in pairs if y.requires_grad), strict=True)
        wanted = [t for t, need in zip(leaves, asked, strict=True) if need]
        grads = iter(torch.autograd.grad(ys, wanted, gs, create_graph=create_graph, allow_unused=True))
    return [next(grads) if need else None for need in asked]


def _bwd_reference(
    gs: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    dilations: list[int],
    stride: int,
    relu: bool,
    max_pool: bool,
    avg_pool: bool,
    x_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, list[Tensor]]:
    branches = _Branches(tuple(dilations), stride, relu, max_pool, avg_pool)
    dx, *dws = _gradients(gs, x, weights, branches, x_grad, [weight_grad] * len(weights))
    dx = x.new_empty(0) if dx is None else map_in_layout_of(dx, x)
    # copy_ and not contiguous(), which keeps the strides of dimensions of one element
    empties = [w.new_empty(0 if dw is None else w.shape) for w, dw in zip(weights, dws, strict=True)]
    return dx, [e if dw is None else e.copy_(dw) for e, dw in zip(empties, dws, strict=True)]


def _bwd_fake(
    gs: list[Tensor],
    x: Tensor,
    weights: list[Tensor],
    dilations: list[int],
    stride: int,
    relu: bool,
    max_pool: bool,
    avg_pool: bool,
    x_grad: bool,
    weight_grad: bool,
) -> tuple[Tensor, list[Tensor]]:
    dx = empty_map(x, *x.shape) if x_grad else x.new_empty(0)
    return dx, [w.new_empty(w.shape if weight_grad else 0) for w in weights]


_fwd = define(
    "depthwise_bank_fwd(Tensor x, Tensor[] weights, int[] dilations, int stride, bool relu, bool max_pool,"
    " bool avg_pool) -> Tensor[]",
    reference=_fwd_reference,
    fake=_fwd_fake,
)
# A gradient that is not asked for is an empty tensor.
_bwd = define(
    "depthwise_bank_bwd(Tensor[] gs, Tensor x, Tensor[] weights, int[] dilations, int stride, bool relu,"
    " bool max_pool, bool avg_pool, bool x_grad, bool weight_grad) -> (Tensor, Tensor[])",
    reference=_bwd_reference,
    fake=_bwd_fake,
)
_backends.register(_OP, "depthwise_bank_fwd", "depthwise_bank_bwd")


class _Branches(NamedTuple):
    """All arguments that are not tensors, in the order of the flat ops."""

    dilations: tuple[int, ...]
    stride: int
    relu: bool
    max_pool: bool
    avg_pool: bool

    def reference(self, x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
        dilations, *rest = self
        return _reference(x, weights, dilations, **dict(zip(self._fields[1:], rest, strict=True)))

    def only(self, kept: Sequence[int]) -> _Branches:
        """The branches whose outputs have these indices."""
        count = len(self.dilations)
        dilations = tuple(self.dilations[i] for i in kept if i < count)
        return self._replace(
            dilations=dilations,
            max_pool=self.max_pool and count in kept,
            avg_pool=self.avg_pool and count + self.max_pool in kept,
        )


class _DepthwiseBank(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, branches: _Branches, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *weights)
        ctx.branches = branches
        return tuple(_fwd(x, weights, *branches))

    @staticmethod
    def backward(ctx, *gs: Tensor | None):
        x, *weights = ctx.saved_tensors
        x_grad, _, *weight_grad = ctx.needs_input_grad
        grads: list[Tensor | None] = [None] * (2 + len(weights))
        # Branches are left out when nothing was made of their output, or nobody wants what it depends on.
        needed = [x_grad or i < len(weights) and weight_grad[i] for i in range(len(gs))]
        kept = [i for i, g in enumerate(gs) if g is not None and needed[i]]
        if not kept:
            return tuple(grads)
        places = [i for i in kept if i < len(weights)]
        gs, branches = [gs[i] for i in kept], ctx.branches.only(kept)
        weights, weight_grad = [weights[i] for i in places], [weight_grad[i] for i in places]
        if torch.is_grad_enabled():  # create_graph: stay differentiable
            dx, *dws = _gradients(gs, x, weights, branches, x_grad, weight_grad, create_graph=True)
        else:
            dx, dws = _bwd(gs, x, weights, *branches, x_grad, any(weight_grad))
        if x_grad:
            grads[0] = dx
        for i, dw, need in zip(places, dws, weight_grad, strict=True):
            grads[2 + i] = dw if need else None
        return tuple(grads)


def depthwise_bank(
    x: Tensor,
    weights: Sequence[Tensor],
    dilations: Sequence[int],
    *,
    stride: int = 1,
    relu: bool = True,
    max_pool: bool = False,
    avg_pool: bool = False,
) -> list[Tensor]:
    """Depthwise convolutions of ``relu(x)``, and 3x3 pools of ``x``, all of one input.

    The first halves of the separable and dilated convolutions of a DARTS edge and its pools, or those of all edges
    that leave a node. The input is read once and its gradient is computed once for all branches. Nothing but ``x``
    and the weights is kept for backward: the ReLU's mask and the maxima are found again. Gradients that nobody
    needs are not computed (weights in an architecture step, the input of a first layer, outputs that were not
    used). Differentiable twice.

    Args:
        x: ``[B, C, H, W]``, float32, float64, bfloat16 or float16.
        weights: tensors ``[C, 1, k, k]`` with odd k, as of ``Conv2d(C, C, k, groups=C)``; float32 or the dtype of
            ``x``.
        dilations: one for each weight. Padding is ``dilation * (k // 2)``, so that every output has ``x``'s size at
            stride 1.
        stride: of all branches, 1 or 2.
        relu: whether the convolutions see ``relu(x)`` or ``x``; the pools always see ``x``, as in DARTS.
        max_pool: append the 3x3 maximum (padding 1).
        avg_pool: append the 3x3 average, padding not counted.

    Returns:
        The outputs ``[B, C, ceil(H / stride), ceil(W / stride)]`` of the convolutions in order, then of the max-pool
        and the average pool if asked for, in the dtype of ``x`` and in channels last if ``x`` is. Sums are
        accumulated in float32 (float64 for float64). Autocast leaves the dtypes as they are.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes, devices, ``dilations`` or ``stride`` do not fit, or no output is asked for.

    Results do not depend on the number of threads. Maths and limits: ``docs/ops/depthwise_bank.md``.
    """
    _check(x, weights, dilations, stride, max_pool or avg_pool)
    branches = _Branches(tuple(dilations), stride, relu, max_pool, avg_pool)
    if _backends.choose(_OP, x.device.type) == "reference":
        return branches.reference(x, weights)
    return list(_DepthwiseBank.apply(x, branches, *weights))


def _check(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int], stride: int, pools: bool) -> None:
    check_floating(_OP, "x", x)
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"{_OP}: x must be [B, C, H, W] with C, H, W > 0, got shape {tuple(x.shape)}")
    check_list(_OP, "weights", weights)
    if len(weights) != len(dilations):
        raise ValueError(f"{_OP}: {len(dilations)} dilations for {len(weights)} weights")
    if not weights and not pools:
        raise ValueError(f"{_OP}: no output is asked for; pass weights, max_pool or avg_pool")
    if stride not in (1, 2):
        raise ValueError(f"{_OP}: stride must be 1 or 2, got {stride}")
    channels = x.shape[1]
    for i, (w, dilation) in enumerate(zip(weights, dilations, strict=True)):
        check_floating(_OP, f"weights[{i}]", w)
        if w.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"{_OP}: weights[{i}] must be {x.dtype} like x or float32, got {w.dtype}")
        if w.ndim != 4 or w.shape[:2] != (channels, 1) or w.shape[2] != w.shape[3] or w.shape[2] % 2 == 0:
            raise ValueError(
                f"{_OP}: weights[{i}] must have shape ({channels}, 1, k, k) with odd k, got {tuple(w.shape)}"
            )
        if w.device != x.device:
            raise ValueError(f"{_OP}: weights[{i}] is on {w.device}, x on {x.device}")
        if not isinstance(dilation, int) or dilation < 1:
            raise ValueError(f"{_OP}: dilations[{i}] must be a positive int, got {dilation!r}")
