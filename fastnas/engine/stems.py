"""The layers before the first cell."""

from __future__ import annotations

from torch import Tensor, nn

from fastnas.engine.exact_norm import exact_norm

STEMS = ("cifar", "imagenet")
STEM_MULTIPLIER = 3  # the CIFAR stem has three times the channels of the first cell's nodes


def _run(layers: nn.Sequential, x: Tensor, exact: bool) -> Tensor:
    for layer in layers:
        x = exact_norm(layer, x) if exact and isinstance(layer, nn.BatchNorm2d) else layer(x)
    return x


class CifarStem(nn.Module):
    """3x3 convolution and batch normalisation at full size; both cell inputs are its output."""

    reduces_at_end = False

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.out_channels = STEM_MULTIPLIER * channels
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, self.out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(self.out_channels),
        )

    def forward(self, x: Tensor, *, exact: bool = False) -> tuple[Tensor, Tensor]:
        """`exact`: normalised by `exact_norm`, for images in channels_last."""
        out = _run(self.layers, x, exact)
        return out, out


class ImageNetStem(nn.Module):
    """Three convolutions of stride 2 (224 -> 28); the cell inputs are the outputs of the second and the third."""

    reduces_at_end = True

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.out_channels = channels
        self.first = nn.Sequential(
            nn.Conv2d(in_channels, channels // 2, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels // 2),
            nn.ReLU(),
            nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.second = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor, *, exact: bool = False) -> tuple[Tensor, Tensor]:
        """`exact`: normalised by `exact_norm`, for images in channels_last."""
        first = _run(self.first, x, exact)
        return first, _run(self.second, first, exact)


def build_stem(kind: str, in_channels: int, channels: int) -> CifarStem | ImageNetStem:
    """`kind`: one of STEMS. Raises ValueError for another."""
    if kind not in STEMS:
        raise ValueError(f"unknown stem {kind!r}; there are {', '.join(STEMS)}")
    return CifarStem(in_channels, channels) if kind == "cifar" else ImageNetStem(in_channels, channels)
