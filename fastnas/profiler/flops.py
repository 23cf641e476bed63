"""Floating-point operations of one call, from PyTorch's own formulas (`torch.utils.flop_counter`) and two more.

PyTorch 2.11 ignores the groups in the backward pass of a convolution: a depthwise one of C channels is counted as
1 + C times its forward pass instead of twice. `FORMULAS` corrects it, and adds the ops of this library that convolve.
Whoever adds an op with matrix products or convolutions adds its formula here; sums and normalisations are free, by the
same convention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor

import fastnas.ops  # noqa: F401  registers the ops named below


def _convolution_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    output_mask: Sequence[bool],
    **_: Any,
) -> int:
    """Each gradient costs one pass: 2 for every weight that an output element (of the input, if transposed) meets."""
    one_pass = 2 * (x if transposed else grad_output).numel() * prod(weight.shape[1:])
    return one_pass * (bool(output_mask[0]) + bool(output_mask[1]))


def _depthwise_bank(x: Tensor, weights: Sequence[Tensor], dilations: Any, stride: int, *_: Any, **__: Any) -> int:
    batch, channels, height, width = x.shape
    outputs = batch * channels * -(-height // stride) * -(-width // stride)
    return sum(2 * outputs * prod(weight.shape[2:]) for weight in weights)


def _depthwise_bank_bwd(gs: Any, x: Tensor, weights: Any, dilations: Any, stride: int, *rest: Any, **_: Any) -> int:
    x_grad, weight_grad = rest[-2:]
    return _depthwise_bank(x, weights, dilations, stride) * (bool(x_grad) + bool(weight_grad))


def _stage_passes(xs: Sequence[Tensor], depthwise: Sequence[Tensor], pointwise: Sequence[Tensor], stride: int) -> Any:
    """Operations of one pass over all depthwise, and over all pointwise convolutions of a conv_stage."""
    batch, height, width, _ = xs[0].shape
    pixels = batch * -(-height // stride) * -(-width // stride)
    return tuple(2 * pixels * sum(weight.numel() for weight in weights) for weights in (depthwise, pointwise))


def _conv_stage_fwd(xs: Any, norms: Any, parts: Any, depthwise: Any, pointwise: Any, stride: int, *_: Any) -> int:
    return sum(_stage_passes(xs, depthwise, pointwise, stride))


def _conv_stage_bwd(
    gs: Any,
    zs: Any,
    coef: Any,
    xs: Any,
    norms: Any,
    parts: Any,
    depthwise: Any,
    pointwise: Any,
    stride: int,
    base: Any,
    need_dx: bool,
    need_dw: bool,
) -> int:
    """The depthwise outputs are computed again for the gradient of the pointwise weights."""
    deep, point = _stage_passes(xs, depthwise, pointwise, stride)
    return point + need_dx * deep + need_dw * (2 * deep + point)


FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten.convolution_backward: _convolution_backward,
    torch.ops.fastnas.depthwise_bank_fwd: _depthwise_bank,
    torch.ops.fastnas.depthwise_bank_bwd: _depthwise_bank_bwd,
    torch.ops.fastnas.conv_stage_fwd: _conv_stage_fwd,
    torch.ops.fastnas.conv_stage_bwd: _conv_stage_bwd,
}


@cache
def _pytorch_formulas() -> dict[Any, Callable[..., int]]:
    # Here, because it loads Triton, which a search that predicts nothing can do without.
    from torch.utils.flop_counter import flop_registry

    return flop_registry


def flops(func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> int:
    """Floating-point operations of a call of the overload `func`; a multiply-add is 2; 0 for what has no formula."""
    packet = func.overloadpacket
    if formula := FORMULAS.get(packet):
        return formula(*args, **kwargs)
    formula = _pytorch_formulas().get(packet)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0
