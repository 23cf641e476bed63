"""Weighted sum of the candidates of an edge, or of all edges of a node, in one pass over memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnas import _backends
from fastnas.ops._checks import check_paths
from fastnas.ops._library import define, in_layout_of
from fastnas.reference.mixed_sum import mixed_sum as _reference


def _fwd_reference(xs: list[Tensor], w: Tensor) -> Tensor:
    return in_layout_of(_reference(xs, w).to(xs[0].dtype), xs[0])


def _bwd_reference(g: Tensor, xs: list[Tensor], w: Tensor) -> tuple[list[Tensor], Tensor]:
    dxs = [in_layout_of(wk * g, xs[0]) for wk in w.flatten()]
    return dxs, _weight_grad(g, xs, w)


def _bwd_xs_reference(g: Tensor, w: Tensor) -> list[Tensor]:
    return [in_layout_of(wk * g, g) for wk in w.flatten()]


def _weight_grad(g: Tensor, xs: Sequence[Tensor], w: Tensor) -> Tensor:
    return torch.stack([(g * x).sum(dtype=w.dtype) for x in xs]).view(w.shape)


_fwd = define(
    "mixed_sum_fwd(Tensor[] xs, Tensor w) -> Tensor",
    reference=_fwd_reference,
    fake=lambda xs, w: torch.empty_like(xs[0]),
)
_bwd = define(
    "mixed_sum_bwd(Tensor g, Tensor[] xs, Tensor w) -> (Tensor[], Tensor)",
    reference=_bwd_reference,
    fake=lambda g, xs, w: (
        [torch.empty_like(xs[0]) for _ in xs],
        torch.empty_like(w, memory_format=torch.contiguous_format),
    ),
)
_bwd_xs = define(
    "mixed_sum_bwd_xs(Tensor g, Tensor w) -> Tensor[]",
    reference=_bwd_xs_reference,
    fake=lambda g, w: [torch.empty_like(g) for _ in range(w.numel())],
)
_backends.register("mixed_sum", "mixed_sum_fwd", "mixed_sum_bwd", "mixed_sum_bwd_xs")


class _MixedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights: Tensor, *xs: Tensor) -> Tensor:
        # Only dw needs the xs: with frozen weights none of them is kept.
        ctx.save_for_backward(weights, *(xs if ctx.needs_input_grad[0] else ()))
        return _fwd(xs, weights)

    @staticmethod
    def backward(ctx, g: Tensor):
        weights, *xs = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: stay differentiable
            dw = _weight_grad(g, xs, weights) if xs else None
            return dw, *(wk * g for wk in weights.flatten())
        if not xs:
            return None, *_bwd_xs(g, weights)
        dxs, dw = _bwd(g, xs, weights)
        return dw, *dxs


def mixed_sum(xs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Weighted sum of tensors of one shape: ``y = sum_k weights[k] * xs[k]``.

    This is the mixed operation of DARTS (equation 2) when ``weights`` is the softmax of an edge's alphas, and a
    whole node (all edges times all candidates) when ``weights`` is ``[edges, candidates]`` and ``xs`` lists the
    candidates edge by edge. Each tensor is read once forward and once backward, where all gradients come out of
    one pass; when ``weights`` needs no gradient no ``x`` is kept. Differentiable twice.

    Args:
        xs: K tensors of one shape (any number of dimensions), dtype (float32, float64, bfloat16, float16) and
            device. Layouts may differ; the fast path is one common dense layout (NCHW, channels last, ...) or slices
            with long contiguous runs, others are copied first.
        weights: K values in any shape, taken in row-major order; float32 or the dtype of ``xs``.

    Returns:
        Tensor of the shape and dtype of ``xs[0]``, in its layout if that is dense. Sums are accumulated in float32
        (float64 for float64). Autocast leaves the dtypes as they are.

    Raises:
        TypeError: ``xs`` holds something else than floating tensors of one dtype, or ``weights`` is not floating.
        ValueError: no tensors, shapes or devices differ, or the number of weights is not K.

    Gradients do not depend on the number of threads. Maths and limits: ``docs/ops/mixed_sum.md``.
    """
    check_paths("mixed_sum", "xs", xs)
    if not isinstance(weights, Tensor):
        raise TypeError(f"mixed_sum: weights must be a tensor, got {type(weights).__name__}")
    if not weights.is_floating_point():
        raise TypeError(f"mixed_sum: weights must be floating point, got {weights.dtype}")
    if weights.numel() != len(xs):
        raise ValueError(
            f"mixed_sum: weights of shape {tuple(weights.shape)} hold {weights.numel()} values for {len(xs)} tensors"
        )
    if weights.device != xs[0].device:
        raise ValueError(f"mixed_sum: weights are on {weights.device}, xs on {xs[0].device}")
    if _backends.choose("mixed_sum", xs[0].device.type) == "reference":
        return _reference(xs, weights)
    return _MixedSum.apply(weights, *xs)
