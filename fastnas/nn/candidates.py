"""Candidate operations of a DARTS cell, and the registry that users extend.

A candidate is a factory `(channels, stride, searching) -> nn.Module` that maps `[B, C, H, W]` to
`[B, C, ceil(H / stride), ceil(W / stride)]`. While searching, batch normalisation has no affine part
and pools are normalised as well (Liu et al. 2019, section 3.1); in a derived network normalisation is
affine and pools stay bare.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CandidateFactory = Callable[[int, int, bool], nn.Module]

_REGISTRY: dict[str, CandidateFactory] = {}


def register_candidate(name: str) -> Callable[[CandidateFactory], CandidateFactory]:
    """Register a candidate operation under `name`, so that a space may list it.

    The decorated factory takes `(channels, stride, searching)` and returns a module whose output has the
    same channels and the size divided by `stride`, rounded up. Raises ValueError if the name is taken.
    """

    def register(factory: CandidateFactory) -> CandidateFactory:
        if name in _REGISTRY:
            raise ValueError(f"candidate {name!r} is already registered; choose another name")
        _REGISTRY[name] = factory
        return factory

    return register


def candidate_names() -> tuple[str, ...]:
    """Names of all registered candidates."""
    return tuple(_REGISTRY)


def build_candidate(name: str, channels: int, stride: int, *, searching: bool) -> nn.Module:
    """Build the candidate `name` for `channels` channels. Raises ValueError for an unknown name."""
    if name not in _REGISTRY:
        raise ValueError(f"unknown candidate {name!r}; registered are {', '.join(_REGISTRY)}")
    return _REGISTRY[name](channels, stride, searching)


class ReLUConvBN(nn.Sequential):
    """ReLU, 1x1 convolution, batch normalisation: [B, C_in, H, W] -> [B, C_out, H, W]."""

    def __init__(self, c_in: int, c_out: int, *, affine: bool) -> None:
        super().__init__(nn.ReLU(), nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out, affine=affine))


class FactorizedReduce(nn.Module):
    """Halve the image with two 1x1 convolutions of stride 2, the second one pixel further down and right.

    [B, C_in, H, W] -> [B, C_out, ceil(H / 2), ceil(W / 2)]; C_out must be even.
    """

    def __init__(self, c_in: int, c_out: int, *, affine: bool) -> None:
        super().__init__()
        if c_out % 2:
            raise ValueError(f"FactorizedReduce needs an even number of output channels, got {c_out}")
        self.conv_even = nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False)
        self.conv_odd = nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(c_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        height, width = x.shape[2:]
        shifted = x[:, :, 1:, 1:]
        if height % 2 or width % 2:  # an odd size has one shifted pixel too few: a border of zeros stands in
            shifted = F.pad(shifted, (0, width % 2, 0, height % 2))
        return self.norm(torch.cat([self.conv_even(x), self.conv_odd(shifted)], dim=1))


def _depthwise_separable(channels: int, kernel: int, stride: int, dilation: int, affine: bool) -> list[nn.Module]:
    padding = dilation * (kernel - 1) // 2
    return [
        nn.ReLU(),
        nn.Conv2d(channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels, affine=affine),
    ]


class DilConv(nn.Sequential):
    """ReLU, depthwise convolution of dilation 2, 1x1 convolution, batch normalisation."""

    def __init__(self, channels: int, kernel: int, stride: int, *, affine: bool) -> None:
        super().__init__(*_depthwise_separable(channels, kernel, stride, 2, affine))


class SepConv(nn.Sequential):
    """ReLU, depthwise, 1x1, batch normalisation, twice; the stride is in the first depthwise convolution."""

    def __init__(self, channels: int, kernel: int, stride: int, *, affine: bool) -> None:
        super().__init__(
            *_depthwise_separable(channels, kernel, stride, 1, affine),
            *_depthwise_separable(channels, kernel, 1, 1, affine),
        )


class Zero(nn.Module):
    """The operation `none`: zeros of the strided size. Keeps its slot in the softmax."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :: self.stride, :: self.stride].mul(0.0)


def _pool(pool: nn.Module, channels: int, searching: bool) -> nn.Module:
    return nn.Sequential(pool, nn.BatchNorm2d(channels, affine=False)) if searching else pool


@register_candidate("none")
def _none(channels: int, stride: int, searching: bool) -> nn.Module:
    return Zero(stride)


@register_candidate("max_pool_3x3")
def _max_pool(channels: int, stride: int, searching: bool) -> nn.Module:
    return _pool(nn.MaxPool2d(3, stride, padding=1), channels, searching)


@register_candidate("avg_pool_3x3")
def _avg_pool(channels: int, stride: int, searching: bool) -> nn.Module:
    return _pool(nn.AvgPool2d(3, stride, padding=1, count_include_pad=False), channels, searching)


@register_candidate("skip_connect")
def _skip(channels: int, stride: int, searching: bool) -> nn.Module:
    return nn.Identity() if stride == 1 else FactorizedReduce(channels, channels, affine=not searching)


@register_candidate("sep_conv_3x3")
def _sep_conv_3(channels: int, stride: int, searching: bool) -> nn.Module:
    return SepConv(channels, 3, stride, affine=not searching)


@register_candidate("sep_conv_5x5")
def _sep_conv_5(channels: int, stride: int, searching: bool) -> nn.Module:
    return SepConv(channels, 5, stride, affine=not searching)


@register_candidate("sep_conv_7x7")
def _sep_conv_7(channels: int, stride: int, searching: bool) -> nn.Module:
    return SepConv(channels, 7, stride, affine=not searching)


@register_candidate("dil_conv_3x3")
def _dil_conv_3(channels: int, stride: int, searching: bool) -> nn.Module:
    return DilConv(channels, 3, stride, affine=not searching)


@register_candidate("dil_conv_5x5")
def _dil_conv_5(channels: int, stride: int, searching: bool) -> nn.Module:
    return DilConv(channels, 5, stride, affine=not searching)
