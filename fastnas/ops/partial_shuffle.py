"""Partial channel connections of PC-DARTS: mix some channels, bypass the rest, shuffle, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnas import _backends
from fastnas._layout import empty_map, map_in_layout_of, memory_format
from fastnas.ops._checks import check_floating, check_paths
from fastnas.ops._library import define
from fastnas.reference.partial_shuffle import partial_shuffle as _reference

_OP = "partial_shuffle"


def _fwd_fake(
    mixed: list[Tensor], weights: Tensor | None, bypass: Tensor, channels: Tensor | None, stride: int
) -> Tensor:
    batch, count, height, width = mixed[0].shape
    total = bypass.shape[1] + (count if channels is None else 0)
    return empty_map(bypass, batch, total, height, width)


def _fwd_reference(
    mixed: list[Tensor], weights: Tensor | None, bypass: Tensor, channels: Tensor | None, stride: int
) -> Tensor:
    return map_in_layout_of(_reference(mixed, weights, bypass, stride=stride, channels=channels), bypass)


def _split_grad(g: Tensor, channels: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """The gradient at the mixture ``[B, count, H', W']`` and at the (pooled) bypass: the shuffle undone."""
    if channels is not None:
        return g.index_select(1, channels), g.index_fill(1, channels, 0.0)
    batch, total, height, width = g.shape
    straight = g.reshape(batch, count, total // count, height, width).transpose(1, 2).reshape(g.shape)
    return straight[:, :count], straight[:, count:]


def _unpool(g: Tensor, bypass: Tensor | None) -> Tensor:
    """Gradient of the bypass from that of its pooled maps; without ``bypass`` nothing was pooled."""
    if bypass is None or g.numel() == 0:
        return g if bypass is None else torch.zeros_like(bypass)
    _, places = F.max_pool2d(bypass.detach(), 2, 2, ceil_mode=True, return_indices=True)
    flat = g.new_zeros(bypass.shape).flatten(2)
    return flat.scatter(2, places.flatten(2), g.flatten(2)).view(bypass.shape)


def _scaled(g: Tensor, weights: Tensor | None) -> list[Tensor]:
    return [g] if weights is None else [w * g for w in weights]


def _weights_grad(g: Tensor, mixed: Sequence[Tensor], weights: Tensor) -> Tensor:
    return torch.stack([(g * x).sum(dtype=weights.dtype) for x in mixed])


def _bwd_reference(
    g: Tensor,
    mixed: list[Tensor],
    weights: Tensor,
    bypass: Tensor | None,
    channels: Tensor | None,
    bypass_grad: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    count = mixed[0].shape[1]
    dmixed, dbypass = _bwd_frozen_reference(g, weights, bypass, channels, count, bypass_grad)
    return dmixed, _weights_grad(_split_grad(g, channels, count)[0], mixed, weights), dbypass


def _bwd_frozen_reference(
    g: Tensor,
    weights: Tensor | None,
    bypass: Tensor | None,
    channels: Tensor | None,
    count: int,
    bypass_grad: bool,
) -> tuple[list[Tensor], Tensor]:
    gm, gb = _split_grad(g, channels, count)
    dbypass = map_in_layout_of(_unpool(gb, bypass), g) if bypass_grad else g.new_empty(0)
    return [map_in_layout_of(dx, g) for dx in _scaled(gm, weights)], dbypass


def _bwd_fake(
    g: Tensor,
    mixed: list[Tensor],
    weights: Tensor,
    bypass: Tensor | None,
    channels: Tensor | None,
    bypass_grad: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    count = mixed[0].shape[1]
    dmixed, dbypass = _bwd_frozen_fake(g, weights, bypass, channels, count, bypass_grad)
    return dmixed, torch.empty_like(weights, memory_format=torch.contiguous_format), dbypass


def _bwd_frozen_fake(
    g: Tensor,
    weights: Tensor | None,
    bypass: Tensor | None,
    channels: Tensor | None,
    count: int,
    bypass_grad: bool,
) -> tuple[list[Tensor], Tensor]:
    batch, total, height, width = g.shape
    if bypass is not None:
        height, width = bypass.shape[2:]
    rest = total if channels is not None else total - count
    paths = 1 if weights is None else weights.shape[0]
    dmixed = [empty_map(g, batch, count, *g.shape[2:]) for _ in range(paths)]
    return dmixed, empty_map(g, batch, rest, height, width) if bypass_grad else g.new_empty(0)


_fwd = define(
    "partial_shuffle_fwd(Tensor[] mixed, Tensor? weights, Tensor bypass, Tensor? channels, int stride) -> Tensor",
    reference=_fwd_reference,
    fake=_fwd_fake,
)
# `bypass` comes only with stride 2, where its gradient depends on it; without bypass_grad dbypass is empty.
_bwd = define(
    "partial_shuffle_bwd(Tensor g, Tensor[] mixed, Tensor weights, Tensor? bypass, Tensor? channels,"
    " bool bypass_grad) -> (Tensor[], Tensor, Tensor)",
    reference=_bwd_reference,
    fake=_bwd_fake,
)
_bwd_frozen = define(
    "partial_shuffle_bwd_frozen(Tensor g, Tensor? weights, Tensor? bypass, Tensor? channels, SymInt count,"
    " bool bypass_grad) -> (Tensor[], Tensor)",
    reference=_bwd_frozen_reference,
    fake=_bwd_frozen_fake,
)
_backends.register(_OP, "partial_shuffle_fwd", "partial_shuffle_bwd", "partial_shuffle_bwd_frozen")


class _PartialShuffle(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weights, bypass, channels, stride, *mixed):
        weights_grad, bypass_grad = ctx.needs_input_grad[:2]
        ctx.bypass_grad = bypass_grad
        ctx.layout = memory_format(bypass)
        ctx.count = mixed[0].shape[1]
        # Only dweights needs the mixed tensors, and only the max-pool's gradient needs the bypass.
        pooled = bypass if stride == 2 and bypass_grad else None
        ctx.save_for_backward(weights, pooled, channels, *(mixed if weights_grad else ()))
        return _fwd(mixed, weights, bypass, channels, stride)

    @staticmethod
    def backward(ctx, g):
        weights, bypass, channels, *mixed = ctx.saved_tensors
        dweights = dbypass = None
        g = g.contiguous(memory_format=ctx.layout)  # else every mixed tensor would be copied into its layout
        if torch.is_grad_enabled():  # create_graph: stay differentiable
            gm, gb = _split_grad(g, channels, ctx.count)
            dmixed = _scaled(gm, weights)
            dweights = _weights_grad(gm, mixed, weights) if mixed else None
            dbypass = _unpool(gb, bypass) if ctx.bypass_grad else None
        elif mixed:
            dmixed, dweights, dbypass = _bwd(g, mixed, weights, bypass, channels, ctx.bypass_grad)
        else:
            dmixed, dbypass = _bwd_frozen(g, weights, bypass, channels, ctx.count, ctx.bypass_grad)
        return dweights, dbypass if ctx.bypass_grad else None, None, None, *dmixed


def partial_shuffle(
    mixed: Sequence[Tensor],
    weights: Tensor | None,
    bypass: Tensor,
    *,
    stride: int = 1,
    channels: Tensor | None = None,
) -> Tensor:
    """Partial channel connection: mix ``C/K`` channels, let the others pass, put every channel in its place.

    PC-DARTS, equation 1. With ``channels=None`` the first ``C/K`` channels are mixed and the result is shuffled
    with K groups, as the paper's authors implement it: with ``s = concat(sum_i weights[i] * mixed[i], pool(bypass))``,
    channel ``c * K + g`` of the result is channel ``g * (C/K) + c`` of ``s``. With ``channels`` given, the mixture
    takes the place of just those channels (the paper's mask S) and nothing is shuffled. No slice, concatenation or
    transposition is made: each input is read once and the result written once. With frozen weights no mixed tensor
    is kept for backward, and the bypass is kept for stride 2 only. Differentiable twice.

    Args:
        mixed: n tensors ``[B, C/K, H', W']`` of one dtype (float32, float64, bfloat16, float16) and device, the
            outputs of the candidates.
        weights: ``[n]``, for example the softmax of an edge's alphas; float32 or the dtype of ``mixed``. ``None``
            with one mixed tensor: a plain shuffle of a concatenation, as in ShuffleNet.
        bypass: the channels that are not mixed, ``[B, C - C/K, H, W]``, usually the view ``x[:, C // K :]``; with
            ``channels`` the whole input ``x``, ``[B, C, H, W]``. Any strides; the result is in channels last when
            this is.
        stride: 1, or 2 to max-pool the bypass over 2 x 2 (``H' = ceil(H / 2)``) as on a reduction edge.
        channels: int64 ``[C/K]``, sorted and distinct, for example from :func:`sample_channels`.

    Returns:
        ``[B, C, H', W']`` in the dtype of ``mixed``; sums are accumulated in float32 (float64 for float64).
        Autocast leaves the dtypes as they are.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: no mixed tensors, or shapes, devices or ``stride`` do not fit together, or ``channels`` on the CPU
            holds values that are not sorted, distinct and inside ``[0, C)``. A GPU's are not looked at, which would
            wait for it; there, values out of range select nothing.

    Gradients do not depend on the number of threads. Maths and limits: ``docs/ops/partial_shuffle.md``.
    """
    _check(mixed, weights, bypass, stride, channels)
    if _backends.choose(_OP, bypass.device.type) == "reference":
        return _reference(mixed, weights, bypass, stride=stride, channels=channels)
    return _PartialShuffle.apply(weights, bypass, channels, stride, *mixed)


def sample_channels(
    channels: int,
    k: int,
    generator: torch.Generator | None = None,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw the ``channels // k`` channels that an edge mixes (PC-DARTS section 3.2): sorted, distinct, int64.

    Args:
        channels: C, all channels of the edge.
        k: K, the inverse of the proportion that is mixed; divides ``channels``.
        generator: source of randomness, by default torch's for the CPU.
        device: where the result lies; the draw is made where ``generator`` lives, and is the same for every device.

    Raises:
        ValueError: ``k`` is not a positive divisor of ``channels``.
    """
    if k < 1 or channels < 1 or channels % k:
        raise ValueError(f"sample_channels: k must be a positive divisor of channels, got {k} and {channels}")
    source = torch.device("cpu") if generator is None else generator.device
    chosen = torch.randperm(channels, generator=generator, device=source)[: channels // k]
    return chosen.sort().values.to(device)


def _check(
    mixed: Sequence[Tensor], weights: Tensor | None, bypass: Tensor, stride: int, channels: Tensor | None
) -> None:
    _check_mixed(mixed, bypass)
    first = mixed[0]
    if weights is None:
        if len(mixed) != 1:
            raise ValueError(f"{_OP}: weights may be None for one mixed tensor only, got {len(mixed)}")
    else:
        check_floating(_OP, "weights", weights)
        if weights.shape != (len(mixed),):
            raise ValueError(f"{_OP}: weights have shape {tuple(weights.shape)}, expected ({len(mixed)},)")
        if weights.device != first.device:
            raise ValueError(f"{_OP}: weights are on {weights.device}, mixed[0] on {first.device}")
    if stride not in (1, 2):
        raise ValueError(f"{_OP}: stride must be 1 or 2, got {stride}")
    height, width = bypass.shape[2:]
    pooled = ((height + stride - 1) // stride, (width + stride - 1) // stride)
    if bypass.shape[0] != first.shape[0] or pooled != first.shape[2:]:
        raise ValueError(
            f"{_OP}: bypass of shape {tuple(bypass.shape)} and stride {stride} does not fit mixed[0] of shape"
            f" {tuple(first.shape)}: it gives {bypass.shape[0]} images of {pooled[0]} x {pooled[1]}"
        )
    if channels is None:
        if bypass.shape[1] % first.shape[1]:
            raise ValueError(
                f"{_OP}: bypass has {bypass.shape[1]} channels, not a multiple of the {first.shape[1]} of mixed;"
                " pass x[:, C // K :]"
            )
        return
    if not isinstance(channels, Tensor) or channels.dtype != torch.int64:
        found = channels.dtype if isinstance(channels, Tensor) else type(channels).__name__
        raise TypeError(f"{_OP}: channels must be an int64 tensor, got {found}")
    if channels.shape != (first.shape[1],) or first.shape[1] > bypass.shape[1]:
        raise ValueError(
            f"{_OP}: channels have shape {tuple(channels.shape)}, expected one index into the {bypass.shape[1]}"
            f" channels of bypass for each of the {first.shape[1]} channels of mixed"
        )
    if channels.device != first.device:
        raise ValueError(f"{_OP}: channels are on {channels.device}, mixed[0] on {first.device}")
    if channels.device.type == "cpu" and not torch.compiler.is_compiling():
        values, total = channels.tolist(), bypass.shape[1]
        if values != sorted(set(values)) or values[0] < 0 or values[-1] >= total:
            raise ValueError(f"{_OP}: channels must be sorted, distinct and inside [0, {total}), got {values}")


def _check_mixed(mixed: Sequence[Tensor], bypass: Tensor) -> None:
    check_paths(_OP, "mixed", mixed)
    check_floating(_OP, "bypass", bypass)
    first = mixed[0]
    shape, dtype, device = first.shape, first.dtype, first.device
    for name, x in (("mixed[0]", first), ("bypass", bypass)):
        if x.ndim != 4:
            raise ValueError(f"{_OP}: {name} must have 4 dimensions [B, C, H, W], got shape {tuple(x.shape)}")
    if shape[1] == 0:
        raise ValueError(f"{_OP}: mixed[0] has no channels, its shape is {tuple(shape)}")
    if bypass.dtype != dtype:
        raise TypeError(f"{_OP}: bypass is {bypass.dtype}, mixed[0] is {dtype}")
    if bypass.device != device:
        raise ValueError(f"{_OP}: bypass is on {bypass.device}, mixed[0] on {device}")
