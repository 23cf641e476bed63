"""What comes before the states of a cell as one stage: ReLU, convolution and batch normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnas.engine.fused_plan import Stage
from fastnas.engine.running import RunningStatistics
from fastnas.ops.stages.conv_stage import conv_stage_bwd, conv_stage_fwd, unflatten
from fastnas.ops.stages.maps import images, maps
from fastnas.ops.stages.node_sum import node_dots, node_sum
from fastnas.ops.stages.norms import through_norms, with_deviation


class _FusedNorm(torch.autograd.Function):
    """A convolution stage of one output, normalised: what comes before the states of a cell."""

    @staticmethod
    def forward(ctx, stage: Stage, running: RunningStatistics, stride: int, training: bool, x, *parameters):
        z, stats = conv_stage_fwd(
            [maps(x)], None, stage.layout.parts, *stage.layout.arranged(parameters), stride, training
        )
        row = torch.zeros(1, dtype=torch.long, device=x.device)
        if training:
            running.update(row, stats, z[0, ..., 0].numel())
        norms = with_deviation(stats if training else running.read(row), running.eps)
        node_sum(z[0], [z[0]], norms.flip(1), False)
        result = images(z[0])
        ctx.save_for_backward(x, norms, result, *parameters)
        ctx.stage, ctx.stride, ctx.training = stage, stride, training
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, norms, result, *parameters = ctx.saved_tensors
        stage, g, y = ctx.stage, maps(grad), maps(result)
        count = y[..., 0].numel()
        dots = node_dots([g], [y], torch.zeros_like(norms[:, 0]))
        # By y = (z - mean) r instead of z, which is not kept: mean 0, deviation 1, and r once more at the end.
        unit = torch.stack([torch.zeros_like(norms[:, 0]), torch.ones_like(norms[:, 0])], dim=1)
        coef = through_norms(unit, 1.0, dots, count, ctx.training)
        coef[:, :3] *= norms[:, 1:2]
        need_dx, need_dw = ctx.needs_input_grad[4], any(ctx.needs_input_grad[5:])
        dx, _, flat = conv_stage_bwd(
            [g],
            [y],
            coef,
            [maps(x)],
            None,
            stage.layout.parts,
            *stage.layout.arranged(parameters),
            ctx.stride,
            None,
            need_dx,
            need_dw,
        )
        gradients = list(unflatten(flat, parameters)) if need_dw else [None] * len(parameters)
        return None, None, None, None, images(dx[0]) if need_dx else None, *gradients


def fused_norm(stage: Stage, running: RunningStatistics, x: Tensor, *, stride: int, training: bool) -> Tensor:
    """BN(stage(x)): x [B, C, H, W] -> [B, O, ceil(H / stride), ceil(W / stride)]; keeps x and the result alone."""
    return _FusedNorm.apply(stage, running, stride, training, x, *stage.weights)
