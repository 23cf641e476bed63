"""A searched network as a backbone of detectors: its maps at several strides (PC-DARTS, section 4.5)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastnas.errors import UserError
from fastnas.nn.candidates import ReLUConvBN


class _Halving(nn.Sequential):
    """[B, C_in, H, W] -> [B, C, ceil(H / 2), ceil(W / 2)]: 1x1 and then depthwise separable convolution."""

    def __init__(self, c_in: int, channels: int) -> None:
        inner = channels // 2
        super().__init__(
            ReLUConvBN(c_in, inner, affine=True),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, stride=2, padding=1, groups=inner, bias=False),
            nn.Conv2d(inner, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )


class Backbone(nn.Module):
    """Images [B, C, H, W] -> an ordered dict of maps "0", "1", ..., as the detectors of torchvision take them.

    `network`: a derived network, trained or not, with normal and reduction cells or of a ShuffleNet-like chain; its
    layers are used as they are, its classifier is let go. `maps`: how many of its last sizes to give, 3 for the three
    stages of a network of cells. `extra`: channels of further maps, each of half the size before it, as SSD has them.
    `out_channels`: channels of every map. Raises UserError for a network without stages or with fewer sizes.
    """

    def __init__(self, network: nn.Module, *, maps: int = 3, extra: Sequence[int] = ()) -> None:
        super().__init__()
        if not hasattr(network, "features"):
            raise UserError(
                f"a {type(network).__name__} gives no maps at several strides: take a network of cells of the DARTS "
                "kind or a ShuffleNet-like chain"
            )
        if any(channels % 2 for channels in extra):
            raise UserError(f"extra maps need even numbers of channels, got {', '.join(map(str, extra))}")
        network.classifier = nn.Identity()
        if hasattr(network, "auxiliary"):
            network.auxiliary = None
        self.network, self.maps = network, maps
        widths = _widths(network)
        if not 1 <= maps <= len(widths):
            raise UserError(f"the network has maps of {len(widths)} sizes: maps must be from 1 to that, got {maps}")
        self.out_channels = [*widths[-maps:], *extra]
        inputs = self.out_channels[maps - 1 :]
        self.extra = nn.ModuleList(_Halving(c_in, channels) for c_in, channels in zip(inputs, extra, strict=False))

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        found = self.network.features(x)[-self.maps :]
        for halving in self.extra:
            found.append(halving(found[-1]))
        return OrderedDict((str(index), map_) for index, map_ in enumerate(found))


@torch.no_grad()
def _widths(network: nn.Module) -> list[int]:
    """Channels of each map of `features`, from a small image."""
    training = network.training
    network.eval()
    weight = next(layer.weight for layer in network.modules() if isinstance(layer, nn.Conv2d))
    widths = [map_.shape[1] for map_ in network.features(weight.new_zeros(1, weight.shape[1], 32, 32))]
    network.train(training)
    return widths
