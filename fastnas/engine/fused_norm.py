"""What comes before the states of a cell as one stage: ReLU, convolution and batch normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnas.engine.fused_plan import Stage
from fastnas.engine.running import RunningStatistics
from fastnas.ops.stages.conv_stage import unflatten
from fastnas.ops.stages.maps import images, maps
from fastnas.ops.stages.norm_stage import norm_stage_bwd, norm_stage_fwd


class _FusedNorm(torch.autograd.Function):
    """A convolution stage of one output, normalised: what comes before the states of a cell."""

    @staticmethod
    def forward(ctx, stage: Stage, running: RunningStatistics, stride: int, training: bool, x, *parameters):
        given = None if training else running.read(None)
        y, norms, stats = norm_stage_fwd(stage.layout, maps(x), parameters, stride, given, running.eps)
        if training:
            running.update(None, stats, y.numel() // y.shape[-1])
        result = images(y)
        ctx.save_for_backward(x, norms, result, *parameters)
        ctx.stage, ctx.stride, ctx.training = stage, stride, training
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, norms, result, *parameters = ctx.saved_tensors
        need_dx, need_dw = ctx.needs_input_grad[4], any(ctx.needs_input_grad[5:])
        dx, dw = norm_stage_bwd(
            ctx.stage.layout,
            maps(grad),
            maps(result),
            norms,
            maps(x),
            parameters,
            ctx.stride,
            ctx.training,
            need_dx,
            need_dw,
        )
        gradients = unflatten(dw, parameters) if need_dw else [None] * len(parameters)
        # No view: autograd adds the gradients of a state's two readers in place.
        return None, None, None, None, images(dx).detach() if need_dx else None, *gradients


def fused_norm(stage: Stage, running: RunningStatistics, x: Tensor, *, stride: int, training: bool) -> Tensor:
    """BN(stage(x)): x [B, C, H, W] -> [B, O, ceil(H / stride), ceil(W / stride)]; keeps x and the result alone."""
    return _FusedNorm.apply(stage, running, stride, training, x, *stage.weights)
