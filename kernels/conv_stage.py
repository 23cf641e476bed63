"""Launchers of ``conv_stage``: ReLU, depthwise and pointwise convolution of many branches in one launch.

A table of integers on the device describes the parts, one row each; it is made once for each stage, so that later
calls, and those that a CUDA graph records, copy nothing from the host. The weights lie behind each other in one buffer,
in the order of their gradient. A pointwise product is ``tl.dot`` in full float32, over channels padded to 16.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from fastnas.kernels._conv_stage import (
    conv_stage_da_kernel,
    conv_stage_ddw_kernel,
    conv_stage_dpw_kernel,
    conv_stage_dx_kernel,
    conv_stage_fwd_kernel,
)
from fastnas.kernels._launch import accumulate_in, config, launch
from fastnas.kernels._stages import (
    block,
    new_parts,
    pitch,
    pitches,
    row_sums,
    statistics,
    tiles,
)

PART = 5  # integers that describe a part: source, output, first output channel, dilation, shift


@functools.cache
def _table(parts: tuple[int, ...], shapes: tuple[tuple[int, int, int], ...], device: torch.device) -> Tensor:
    """The rows of all parts, int32 on ``device``; shapes: side, depthwise elements and output channels of each.

    Kept for good, a few hundred bytes each: a CUDA graph records the kernels that read it, and could not record this
    copy from the host.
    """
    rows, at = [], 0
    for number, (side, depthwise, outputs, channels) in enumerate(shapes):
        rows += [*parts[PART * number : PART * number + PART], side, at, at + depthwise, outputs]
        at += depthwise + outputs * channels
    return torch.tensor(rows, dtype=torch.int32, device=device)


class _Stage:
    """The sizes that the kernels of one call share, the table of its parts and their weights."""

    def __init__(
        self,
        xs: Sequence[Tensor],
        parts: Sequence[int],
        depthwise: Sequence[Tensor],
        pointwise: Sequence[Tensor],
        stride: int,
    ) -> None:
        x = xs[0]
        self.device, self.stride = x.device, stride
        self.batch, self.height, self.width, self.channels = x.shape
        self.out = (-(-self.height // stride), -(-self.width // stride))
        self.positions = self.batch * self.out[0] * self.out[1]
        self.parts, self.sources = len(pointwise), len(xs)
        self.outputs = 1 + max(parts[1::PART])
        ends = [first + weight.shape[0] for first, weight in zip(parts[2::PART], pointwise, strict=True)]
        self.out_channels = max(ends)
        self.widest = max(weight.shape[0] for weight in pointwise)  # output channels of a part
        shapes = tuple(
            (d.shape[-1] if d.numel() else 0, d.numel(), *p.shape[:2])
            for d, p in zip(depthwise, pointwise, strict=True)
        )
        self.has_depthwise = any(d.numel() for d in depthwise)
        self.table = _table(tuple(parts), shapes, x.device)
        pairs = zip(depthwise, pointwise, strict=True)
        self.weights = torch.cat([weight.reshape(-1) for pair in pairs for weight in pair])
        self.maps, self.pitches = tuple(xs), pitches(xs)
        self.sizes = (self.height, self.width, *self.out)
        _, self.acc = accumulate_in(x.dtype)


def conv_stage_fwd(
    xs: Sequence[Tensor],
    norms: Tensor | None,
    parts: Sequence[int],
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    stride: int,
    statistics_wanted: bool,
) -> tuple[Tensor, Tensor]:
    """z ``[outputs, B, H', W', O]``, and mean and variance ``[outputs, 2, O]`` if wanted."""
    stage = _Stage(xs, parts, depthwise, pointwise, stride)
    z = xs[0].new_empty(stage.outputs, stage.batch, *stage.out, stage.out_channels)
    if z.numel() == 0:
        return z, stage.weights.new_zeros((stage.outputs, 2, stage.out_channels) if statistics_wanted else 0)
    at = config("conv_stage_fwd", z[0])
    bq, limit = block(stage.positions, at.pop("BQ"), 16), at.pop("BLOCK")
    bo = block(stage.widest, limit, 16)
    count, columns = triton.cdiv(stage.positions, bq), triton.cdiv(stage.widest, bo)
    rows = stage.outputs * stage.out_channels
    partial = new_parts(z, 2, rows, count) if statistics_wanted else None
    launch(
        stage.device,
        conv_stage_fwd_kernel,
        count * columns * stage.parts,
        stage.maps,
        norms if norms is None else norms.contiguous(),
        stage.table,
        stage.weights,
        z,
        partial,
        stage.pitches,
        stage.channels,
        stage.out_channels,
        stage.positions,
        *stage.sizes,
        columns,
        rows,
        SOURCES=stage.sources,
        STRIDE=stride,
        ACC=stage.acc,
        BQ=bq,
        BC=16,
        BO=bo,
        **at,
    )
    if partial is None:
        return z, stage.weights.new_empty(0)
    return z, statistics(partial, z, stage.outputs, stage.positions, bq)


def conv_stage_bwd(
    gs: Sequence[Tensor],
    zs: Sequence[Tensor],
    coef: Tensor,
    xs: Sequence[Tensor],
    norms: Tensor | None,
    parts: Sequence[int],
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    stride: int,
    base: Tensor | None,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx by what relu took, its sums where there are norms, and the weights' gradients in one piece."""
    stage = _Stage(xs, parts, depthwise, pointwise, stride)
    none = stage.weights.new_empty(0)
    norms = norms if norms is None else norms.contiguous()
    given = (tuple(gs), tuple(zs), coef.contiguous())
    if stage.positions == 0:
        dx = xs[0].new_empty(len(xs), *xs[0].shape) if need_dx else none
        dots = none.new_zeros(len(xs), 2, stage.channels) if need_dx and norms is not None else none
        return dx, dots, torch.zeros_like(stage.weights) if need_dw else none
    da = _output_gradient(stage, given) if need_dx or stage.has_depthwise else None
    dx, dots = _input_gradient(stage, da, norms, base) if need_dx else (none, none)
    return dx, dots, _weight_gradient(stage, da, given, norms) if need_dw else none


def _output_gradient(stage: _Stage, given: tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]) -> Tensor:
    """da ``[parts, B H' W', C]``."""
    gs, zs, coef = given
    da = stage.maps[0].new_empty(stage.parts, stage.positions, stage.channels)
    at = config("conv_stage_da", da[0])
    bq, limit = block(stage.positions, at.pop("BQ"), 16), at.pop("BLOCK")
    bc = block(stage.channels, limit, 16)
    launch(
        stage.device,
        conv_stage_da_kernel,
        triton.cdiv(stage.positions, bq) * triton.cdiv(stage.channels, bc) * stage.parts,
        gs,
        zs,
        coef,
        stage.table,
        stage.weights,
        da,
        pitches(gs),
        pitches(zs),
        stage.channels,
        stage.out_channels,
        stage.positions,
        OUTPUTS=stage.outputs,
        ACC=stage.acc,
        BQ=bq,
        BC=bc,
        BO=16,
        **at,
    )
    return da


def _input_gradient(stage: _Stage, da: Tensor, norms: Tensor | None, base: Tensor | None) -> tuple[Tensor, Tensor]:
    """dx ``[sources, B, H, W, C]``, and its sums ``[sources, 2, C]`` where there are norms."""
    x = stage.maps[0]
    dx = x.new_empty(stage.sources, *x.shape)
    dots = stage.weights.new_empty((stage.sources, 2, stage.channels) if norms is not None else 0)
    rows, columns, at = tiles("conv_stage_dx", x, stage.channels)
    partial = new_parts(x, dots.numel(), rows) if norms is not None else None
    launch(
        stage.device,
        conv_stage_dx_kernel,
        rows * columns * stage.sources,
        da,
        stage.maps,
        norms,
        stage.table,
        stage.weights,
        base,
        dx,
        partial,
        stage.pitches,
        0 if base is None else pitch(base),
        stage.channels,
        stage.positions,
        x.numel() // stage.channels,
        *stage.sizes,
        stage.parts,
        SOURCES=stage.sources,
        STRIDE=stage.stride,
        **at,
    )
    return dx, dots if partial is None else row_sums(partial, dots)


def _weight_gradient(
    stage: _Stage,
    da: Tensor | None,
    given: tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor],
    norms: Tensor | None,
) -> Tensor:
    """All gradients, flat, in the order of the weights; sums over chunks of the positions, then over the chunks."""
    gs, zs, coef = given
    at = config("conv_stage_dpw", gs[0])
    bq, limit, chunks = block(stage.positions, at.pop("BQ"), 16), at.pop("BLOCK"), at.pop("CHUNKS")
    count = triton.cdiv(stage.positions, bq)
    per_chunk = triton.cdiv(count, chunks)
    chunks = triton.cdiv(count, per_chunk)
    partial = new_parts(stage.weights, stage.weights.numel(), chunks)
    bc, bo = block(stage.channels, limit, 16), block(stage.widest, limit, 16)
    columns = triton.cdiv(stage.widest, bo)
    launch(
        stage.device,
        conv_stage_dpw_kernel,
        chunks * triton.cdiv(stage.channels, bc) * columns * stage.parts,
        stage.maps,
        gs,
        zs,
        coef,
        norms,
        stage.table,
        stage.weights,
        partial,
        stage.pitches,
        pitches(gs),
        pitches(zs),
        stage.channels,
        stage.out_channels,
        stage.positions,
        *stage.sizes,
        chunks,
        per_chunk,
        columns,
        SOURCES=stage.sources,
        OUTPUTS=stage.outputs,
        STRIDE=stage.stride,
        ACC=stage.acc,
        BQ=bq,
        BC=bc,
        BO=bo,
        **at,
    )
    if stage.has_depthwise:
        at = config("conv_stage_ddw", gs[0])
        bc = block(stage.channels, at.pop("BLOCK"))
        launch(
            stage.device,
            conv_stage_ddw_kernel,
            chunks * triton.cdiv(stage.channels, bc) * stage.parts,
            da,
            stage.maps,
            norms,
            stage.table,
            partial,
            stage.pitches,
            stage.channels,
            stage.positions,
            *stage.sizes,
            chunks,
            per_chunk,
            SOURCES=stage.sources,
            STRIDE=stage.stride,
            ACC=stage.acc,
            BQ=bq,
            BC=bc,
            **at,
        )
    return row_sums(partial, stage.weights)
