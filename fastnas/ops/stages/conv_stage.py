"""ReLU, depthwise and pointwise convolution of many branches at once, with the statistics that follow them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnas import _backends
from fastnas.ops._library import define

PART = 5  # integers that describe a part: source, output, first output channel, dilation, shift


def _out_size(x: Tensor, stride: int) -> tuple[int, int]:
    return -(-x.shape[1] // stride), -(-x.shape[2] // stride)


def _parts(parts: Sequence[int]) -> list[Sequence[int]]:
    return [parts[start : start + PART] for start in range(0, len(parts), PART)]


def _outputs(parts: Sequence[int], pointwise: Sequence[Tensor]) -> tuple[int, int]:
    """Number of outputs, and channels of each."""
    described = _parts(parts)
    count = 1 + max(part[1] for part in described)
    return count, max(part[2] + weight.shape[0] for part, weight in zip(described, pointwise, strict=True))


def _activated(x: Tensor, norms: Tensor | None, source: int, dtype: torch.dtype) -> Tensor:
    """relu(x), or relu of the normalised x; as [B, C, H, W]."""
    x = x.to(dtype)
    if norms is not None:
        x = (x - norms[source, 0]) * norms[source, 1]
    return F.relu(x).permute(0, 3, 1, 2)


def _convolve(a: Tensor, depthwise: Tensor, pointwise: Tensor, dilation: int, shift: int, stride: int) -> Tensor:
    if depthwise.numel():
        padding = dilation * (depthwise.shape[-1] - 1) // 2
        a = F.conv2d(a, depthwise, None, stride, padding, dilation, groups=a.shape[1])
    else:
        height, width = a.shape[2:]
        a = F.pad(a, (0, shift, 0, shift))[:, :, shift:, shift:][:, :, :height:stride, :width:stride]
    return F.conv2d(a, pointwise).permute(0, 2, 3, 1)


def _fwd_reference(
    xs: list[Tensor],
    norms: Tensor | None,
    parts: list[int],
    depthwise: list[Tensor],
    pointwise: list[Tensor],
    stride: int,
    statistics: bool,
) -> tuple[Tensor, Tensor]:
    count, channels = _outputs(parts, pointwise)
    z = pointwise[0].new_empty(count, xs[0].shape[0], *_out_size(xs[0], stride), channels)
    for (source, output, first, dilation, shift), dw, pw in zip(_parts(parts), depthwise, pointwise, strict=True):
        value = _convolve(_activated(xs[source], norms, source, z.dtype), dw, pw, dilation, shift, stride)
        z[output, ..., first : first + pw.shape[0]] = value
    stored = z.to(xs[0].dtype)
    if not statistics:
        return stored, z.new_empty(0)
    variance, mean = torch.var_mean(z, dim=(1, 2, 3), correction=0)
    return stored, torch.stack([mean, variance], dim=1)


def _fwd_fake(
    xs: list[Tensor],
    norms: Tensor | None,
    parts: list[int],
    depthwise: list[Tensor],
    pointwise: list[Tensor],
    stride: int,
    statistics: bool,
) -> tuple[Tensor, Tensor]:
    count, channels = _outputs(parts, pointwise)
    z = xs[0].new_empty(count, xs[0].shape[0], *_out_size(xs[0], stride), channels)
    return z, pointwise[0].new_empty((count, 2, channels) if statistics else 0)


def _bwd_reference(
    gs: list[Tensor],
    zs: list[Tensor],
    coef: Tensor,
    xs: list[Tensor],
    norms: Tensor | None,
    parts: list[int],
    depthwise: list[Tensor],
    pointwise: list[Tensor],
    stride: int,
    base: Tensor | None,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    described, dtype = _parts(parts), pointwise[0].dtype
    dz = [c[0] * g + c[1] * (z - c[3]) + c[2] for g, z, c in zip(gs, zs, coef, strict=True)]
    with torch.enable_grad():
        if norms is None:
            inputs = [x.to(dtype).detach().requires_grad_() for x in xs]
        else:
            inputs = [((x - norm[0]) * norm[1]).detach().requires_grad_() for x, norm in zip(xs, norms, strict=True)]
        depthwise = [weight.detach().requires_grad_() for weight in depthwise]
        pointwise = [weight.detach().requires_grad_() for weight in pointwise]
        total = coef.new_zeros(())
        for (source, output, first, dilation, shift), dw, pw in zip(described, depthwise, pointwise, strict=True):
            value = _convolve(_activated(inputs[source], None, source, dtype), dw, pw, dilation, shift, stride)
            total = total + (value * dz[output][..., first : first + pw.shape[0]]).sum()
        weights = [weight for pair in zip(depthwise, pointwise, strict=True) for weight in pair if weight.numel()]
        gradients = torch.autograd.grad(total, [*inputs, *weights])
    dx, dots, dw = xs[0].new_empty(0), coef.new_empty(0), coef.new_empty(0)
    if need_dx:
        dx = torch.stack([gradient.contiguous() for gradient in gradients[: len(xs)]])
        if norms is not None:
            centred = torch.stack([x - norm[0] for x, norm in zip(xs, norms, strict=True)])
            dots = torch.stack([dx.sum((1, 2, 3)), (dx * centred).sum((1, 2, 3))], dim=1)
        if base is not None:
            dx += base
        dx = dx.to(xs[0].dtype)
    if need_dw:
        dw = torch.cat([gradient.flatten() for gradient in gradients[len(xs) :]])
    return dx, dots, dw


def _bwd_fake(
    gs: list[Tensor],
    zs: list[Tensor],
    coef: Tensor,
    xs: list[Tensor],
    norms: Tensor | None,
    parts: list[int],
    depthwise: list[Tensor],
    pointwise: list[Tensor],
    stride: int,
    base: Tensor | None,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    count = sum(weight.numel() for weight in (*depthwise, *pointwise))
    return (
        xs[0].new_empty((len(xs), *xs[0].shape) if need_dx else 0),
        coef.new_empty((len(xs), 2, xs[0].shape[-1]) if need_dx and norms is not None else 0),
        coef.new_empty(count if need_dw else 0),
    )


_conv_stage_fwd = define(
    "conv_stage_fwd(Tensor[] xs, Tensor? norms, int[] parts, Tensor[] depthwise, Tensor[] pointwise, int stride, "
    "bool statistics) -> (Tensor, Tensor)",
    reference=_fwd_reference,
    fake=_fwd_fake,
)
conv_stage_fwd = _backends.served("conv_stage", _conv_stage_fwd, _fwd_reference)
"""Every part p reads ``xs[source]``, and writes channels ``first ...`` of its output::

    z[output][..., first:] = pointwise[p] * (depthwise[p] * relu(x))

with the depthwise convolution at ``stride`` and the part's dilation. A part without one (an empty tensor) takes the
pixels ``stride * i + shift`` instead, zero beyond the border (FactorizedReduce has two such parts). With ``norms``
``[sources, 2, C]``, mean and 1 / standard deviation, relu takes ``(x - mean) * norm``.

xs: maps ``[B, H, W, C]`` of one shape. parts: ``PART`` integers each. depthwise: ``[C, 1, 3, 3]``, ``[C, 1, 5, 5]``
or empty; pointwise: ``[O, C, 1, 1]``.
Returns z ``[outputs, B, ceil(H / stride), ceil(W / stride), O]`` and, with `statistics`, mean and biased variance of
every output, ``[outputs, 2, O]``.
"""

_conv_stage_bwd = define(
    "conv_stage_bwd(Tensor[] gs, Tensor[] zs, Tensor coef, Tensor[] xs, Tensor? norms, int[] parts, "
    "Tensor[] depthwise, Tensor[] pointwise, int stride, Tensor? base, bool need_dx, bool need_dw) "
    "-> (Tensor, Tensor, Tensor)",
    reference=_bwd_reference,
    fake=_bwd_fake,
)
conv_stage_bwd = _backends.served("conv_stage", _conv_stage_bwd, _bwd_reference)
"""The gradient that reaches output n is ``coef[n, 0] g + coef[n, 1] (z - coef[n, 3]) + coef[n, 2]``, per channel: that
of a batch normalisation behind z, which thus is never written out.

gs, zs: a map ``[B, H', W', O]`` an output; coef: ``[outputs, 4, O]``. What happened before the pointwise convolution is
computed again. Returns
dx ``[sources, B, H, W, C]``, by what relu took, plus `base` (a map, with one source only);
with `norms` the sums of dx and of dx (x - mean), ``[sources, 2, C]``;
and the weights' gradients, flat, part by part, depthwise before pointwise.
What was not asked for, or has no meaning, has no elements.
"""


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """A flat gradient as views of the weights' shapes."""
    return list(torch._C._nn.unflatten_dense_tensors(flat, like))


_backends.register("conv_stage", "conv_stage_fwd", "conv_stage_bwd")
