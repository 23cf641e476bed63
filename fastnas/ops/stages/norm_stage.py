"""ReLU, convolution and batch normalisation, from one map to one: what comes before the states of a cell.

With y = r (z - mean), where r = 1 / sqrt(var + eps), neither ReLU nor z have to be kept:

    dz = r (g - sum g / n - y sum g y / n)

for n pixels of the batch; with running statistics dz = r g.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastnas.ops._library import define
from fastnas.ops.stages.conv_stage import PART, conv_stage_bwd, conv_stage_fwd
from fastnas.ops.stages.node_sum import node_dots, node_sum
from fastnas.ops.stages.norms import through_norms, with_deviation
from fastnas.ops.stages.source_layout import Convolutions, end_to_end
from fastnas.ops.stages.whole import in_one_call


def forward_step_by_step(
    stage: Convolutions, x: Tensor, weights: Sequence[Tensor], stride: int, given: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`norm_stage_fwd`, on any backend."""
    own = stage.arranged(stage.parted(weights, x.shape[-1]))
    z, stats = conv_stage_fwd([x], None, stage.parts, *own, stride, given is None)
    norms = with_deviation(stats if given is None else given, eps)
    y = z[0]
    node_sum(y, [y], norms.flip(1), False)
    return y, norms, stats


def backward_step_by_step(
    stage: Convolutions,
    g: Tensor,
    y: Tensor,
    norms: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    stride: int,
    training: bool,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor]:
    """`norm_stage_bwd`, on any backend."""
    own = stage.arranged(stage.parted(weights, x.shape[-1]))
    dots = node_dots([g], [y], torch.zeros_like(norms[:, 0]))
    unit = torch.stack([torch.zeros_like(norms[:, 0]), torch.ones_like(norms[:, 0])], dim=1)
    coef = through_norms(unit, 1.0, dots, y[..., 0].numel(), training)
    coef[:, :3] *= norms[:, 1:2]
    dx, _, dw = conv_stage_bwd([g], [y], coef, [x], None, stage.parts, *own, stride, None, need_dx, need_dw)
    return dx[0] if need_dx else dx, dw


def _unpacked(shapes: list[int], parts: list[int]) -> Convolutions:
    outputs = 1 + max(parts[1::PART])
    return Convolutions(list(parts), list(shapes[0::2]), list(shapes[1::2]), outputs)


def _fwd_reference(
    x: Tensor, weights: Tensor, shapes: list[int], parts: list[int], stride: int, given: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return forward_step_by_step(_unpacked(shapes, parts), x, [weights], stride, given, eps)


def _bwd_reference(
    g: Tensor,
    y: Tensor,
    norms: Tensor,
    x: Tensor,
    weights: Tensor,
    shapes: list[int],
    parts: list[int],
    stride: int,
    training: bool,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor]:
    return backward_step_by_step(
        _unpacked(shapes, parts), g, y, norms, x, [weights], stride, training, need_dx, need_dw
    )


def _fwd_fake(
    x: Tensor, weights: Tensor, shapes: list[int], parts: list[int], stride: int, given: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, height, width, _ = x.shape
    channels = max(first + made for first, made in zip(parts[2::PART], shapes[1::2], strict=True))
    y = x.new_empty(batch, -(-height // stride), -(-width // stride), channels)
    return y, weights.new_empty(1, 2, channels), weights.new_empty((1, 2, channels) if given is None else 0)


def _bwd_fake(
    g: Tensor,
    y: Tensor,
    norms: Tensor,
    x: Tensor,
    weights: Tensor,
    shapes: list[int],
    parts: list[int],
    stride: int,
    training: bool,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if need_dx else 0), weights.new_empty(weights.shape if need_dw else 0)


_norm_stage_fwd = define(
    "norm_stage_fwd(Tensor x, Tensor weights, int[] shapes, int[] parts, int stride, Tensor? given, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    reference=_fwd_reference,
    fake=_fwd_fake,
)
_norm_stage_bwd = define(
    "norm_stage_bwd(Tensor g, Tensor y, Tensor norms, Tensor x, Tensor weights, int[] shapes, int[] parts, int stride, "
    "bool training, bool need_dx, bool need_dw) -> (Tensor, Tensor)",
    reference=_bwd_reference,
    fake=_bwd_fake,
)


def norm_stage_fwd(
    stage: Convolutions, x: Tensor, weights: Sequence[Tensor], stride: int, given: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """BN(conv(relu(x))) of a map x ``[B, H, W, C]`` by a stage of one output.

    weights: part by part, depthwise before pointwise, or all end to end in one row. given: running mean and variance
    ``[1, 2, O]``; without them the batch's own are measured. Returns y ``[B, H', W', O]``, mean and 1 / standard
    deviation ``[1, 2, O]``, and mean and biased variance where they were measured.
    """
    if in_one_call(x):
        return _norm_stage_fwd(x, end_to_end(weights, x), stage.flat_shapes, stage.parts, stride, given, eps)
    return forward_step_by_step(stage, x, weights, stride, given, eps)


def norm_stage_bwd(
    stage: Convolutions,
    g: Tensor,
    y: Tensor,
    norms: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    stride: int,
    training: bool,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weights, end to end, from that of y; empty where they are not asked for."""
    if in_one_call(x):
        return _norm_stage_bwd(
            g, y, norms, x, end_to_end(weights, x), stage.flat_shapes, stage.parts, stride, training, need_dx, need_dw
        )
    return backward_step_by_step(stage, g, y, norms, x, weights, stride, training, need_dx, need_dw)
