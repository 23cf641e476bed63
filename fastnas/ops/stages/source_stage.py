"""All that leaves one state of a cell: its stages, and their terms added to the nodes.

A candidate ends in batch normalisation without affine part, so w BN(z) = w r (z - mean) is folded into the sum of its
node, and its backward pass needs only sum g and sum g (z - mean) per channel, which also are the gradient of w:

    dw = sum_c r S,   dz = w r (g - sum g / n - r^2 (z - mean) S / n),   S = sum g (z - mean)

for n pixels of the batch. No normalised tensor, no ReLU output, no depthwise output and no pool output is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fastnas.ops._library import define
from fastnas.ops.stages.source_layout import Layout, end_to_end
from fastnas.ops.stages.source_steps import backward_stage_by_stage, forward_stage_by_stage
from fastnas.ops.stages.whole import in_one_call


def _unpacking(steps: Callable[..., Any]) -> Callable[..., Any]:
    """The reference of a flat op, whose layout is a list of integers."""
    return lambda x, weights, layout, *more: steps(Layout.unpack(layout), x, [weights], *more)


def _maps_of(x: Tensor, stride: int, count: int) -> Tensor:
    batch, height, width, channels = x.shape
    return x.new_empty((count, batch, -(-height // stride), -(-width // stride), channels) if count else 0)


def _fwd_fake(
    x: Tensor,
    weights: Tensor,
    layout: list[int],
    mixture: Tensor,
    given: Tensor | None,
    nodes: list[Tensor],
    begun: list[int],
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    known, channels = Layout.unpack(layout), x.shape[-1]
    first, second = (stage.outputs if keep else 0 for stage in (known.first, known.second))
    return (
        mixture.new_empty(known.rows, 2, channels),
        mixture.new_empty((known.rows - 1, 2, channels) if given is None else 0),
        _maps_of(x, known.stride, first),
        _maps_of(x, known.stride, second),
    )


def _bwd_fake(
    x: Tensor,
    weights: Tensor,
    layout: list[int],
    mixture: Tensor,
    norms: Tensor,
    first: Tensor,
    second: Tensor,
    gs: list[Tensor],
    base: Tensor | None,
    training: bool,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_dx else 0),
        norms.new_empty(len(Layout.unpack(layout).terms)),
        weights.new_empty(len(weights) if need_dw else 0),
    )


_source_stage_fwd = define(
    "source_stage_fwd(Tensor x, Tensor weights, int[] layout, Tensor mixture, Tensor? given, Tensor(a!)[] nodes, "
    "int[] begun, float eps, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_unpacking(forward_stage_by_stage),
    fake=_fwd_fake,
)
_source_stage_bwd = define(
    "source_stage_bwd(Tensor x, Tensor weights, int[] layout, Tensor mixture, Tensor norms, Tensor first, "
    "Tensor second, Tensor[] gs, Tensor? base, bool training, bool need_dx, bool need_dw) "
    "-> (Tensor, Tensor, Tensor)",
    reference=_unpacking(backward_stage_by_stage),
    fake=_bwd_fake,
)


def source_stage_fwd(
    layout: Layout,
    x: Tensor,
    weights: Sequence[Tensor],
    mixture: Tensor,
    given: Tensor | None,
    nodes: list[Tensor],
    begun: list[int],
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the stages on the map x ``[B, H, W, C]`` and write every term, times its weight, to its node.

    weights: those of both stages, part by part, depthwise before pointwise, or all end to end in one row. mixture:
    ``[E, O]``, the weights of the candidates of all edges. given: running mean and variance of all rows of the norms
    but the first, ``[rows - 1, 2, C]``; without them the batch's own are measured. nodes: a map ``[B, H', W', C]``
    each; `begun` says which of them already hold something to add to.
    Returns norms (mean and 1 / standard deviation, ``[rows, 2, C]``), mean and biased variance where they were
    measured, and the outputs of both stages, ``[outputs, B, H', W', C]``. What was not measured, or not kept, has no
    elements.
    """
    if in_one_call(x):
        return _source_stage_fwd(x, end_to_end(weights, x), layout.packed, mixture, given, nodes, begun, eps, keep)
    return forward_stage_by_stage(layout, x, weights, mixture, given, nodes, begun, eps, keep)


def source_stage_bwd(
    layout: Layout,
    x: Tensor,
    weights: Sequence[Tensor],
    mixture: Tensor,
    norms: Tensor,
    first: Tensor,
    second: Tensor,
    gs: list[Tensor],
    base: Tensor | None,
    training: bool,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `source_stage_fwd`, whose arguments and results come first.

    gs: those of the nodes. Returns that of x on top of `base`, those of the weights of the terms ``[terms]``, and that
    of the weights, end to end; what was not asked for has no elements. Outputs of the stages that were not kept are
    computed again.
    """
    if in_one_call(x):
        return _source_stage_bwd(
            x,
            end_to_end(weights, x),
            layout.packed,
            mixture,
            norms,
            first,
            second,
            gs,
            base,
            training,
            need_dx,
            need_dw,
        )
    return backward_stage_by_stage(
        layout, x, weights, mixture, norms, first, second, gs, base, training, need_dx, need_dw
    )
