"""The ShuffleNet-like chain: the supernet of its space, and the same with one choice a layer built alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnas.errors import UserError
from fastnas.spaces.architecture import ArchitectureString
from fastnas.spaces.shufflenet import SHUFFLENET_CANDIDATES, ShufflenetSpace

STAGE_WIDTHS = (4, 10, 20, 40)  # times the stem's channels: 64, 160, 320 and 640 for the 16 of Single Path One-Shot
LAST_WIDTH = 64  # 1,024


class SqueezeExcitation(nn.Module):
    """Channels scaled by a sigmoid of two 1x1 convolutions of their means."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(1, channels // 4)
        self.gate = nn.Sequential(
            nn.Conv2d(channels, inner, 1), nn.ReLU(), nn.Conv2d(inner, channels, 1), nn.Hardsigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(F.adaptive_avg_pool2d(x, 1))


def _depthwise(channels: int, kernel: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)
    return [conv, nn.BatchNorm2d(channels)]


def _pointwise(c_in: int, channels: int, activation: type[nn.Module]) -> list[nn.Module]:
    return [nn.Conv2d(c_in, channels, 1, bias=False), nn.BatchNorm2d(channels), activation()]


class ShuffleBlock(nn.Module):
    """[B, C_in, H, W] -> [B, C_out, H / stride, W / stride]: half of the channels passes, half is transformed.

    With stride 1 (C_in = C_out) the even channels pass as they are and the odd ones are transformed, which is
    ShuffleNetV2's channel shuffle and split in one; with stride 2 all channels go both ways.
    """

    def __init__(self, name: str, c_in: int, channels: int, stride: int, *, extras: bool) -> None:
        super().__init__()
        self.stride = stride
        swish = extras and name != "shuffle_3x3"
        activation: type[nn.Module] = nn.SiLU if swish else nn.ReLU
        half, inner = channels // 2, channels // 2
        source = c_in if stride == 2 else c_in // 2
        out = channels - half
        if name == "xception_3x3":
            layers = _depthwise(source, 3, stride) + _pointwise(source, inner, activation)
            layers += _depthwise(inner, 3, 1) + _pointwise(inner, inner, activation)
            layers += _depthwise(inner, 3, 1) + _pointwise(inner, out, activation)
            kernel = 3
        else:
            kernel = int(name[-1])
            layers = _pointwise(source, inner, activation) + _depthwise(inner, kernel, stride)
            layers += _pointwise(inner, out, activation)
        if extras and name in ("shuffle_7x7", "xception_3x3"):
            layers.append(SqueezeExcitation(out))
        self.main = nn.Sequential(*layers)
        self.side: nn.Module | None = None
        if stride == 2:
            self.side = nn.Sequential(*_depthwise(c_in, kernel, 2), *_pointwise(c_in, half, activation))

    def forward(self, x: Tensor) -> Tensor:
        if self.side is not None:
            return torch.cat([self.side(x), self.main(x)], dim=1)
        return torch.cat([x[:, ::2], self.main(x[:, 1::2])], dim=1)


class ShufflenetNetwork(nn.Module):
    """Stem, chain, 1x1 convolution, pool, classifier; calling it gives logits [B, classes].

    `channels`: of the stem; stages have 4, 10, 20 and 40 times as many. `stem`: "imagenet" halves the image, "cifar"
    does not. `only`: build that architecture alone.
    """

    def __init__(
        self,
        space: ShufflenetSpace,
        *,
        channels: int,
        classes: int,
        in_channels: int = 3,
        stem: str = "cifar",
        only: ArchitectureString | None = None,
    ) -> None:
        super().__init__()
        self.only = None if only is None else only.string
        width = channels
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, stride=2 if stem == "imagenet" else 1, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.layers = nn.ModuleList()
        for stage, factor in zip(space.stages, STAGE_WIDTHS, strict=True):
            for layer in range(stage):
                every = range(len(SHUFFLENET_CANDIDATES))
                chosen = every if only is None else (only.string[len(self.layers)],)
                self.layers.append(
                    nn.ModuleDict(
                        {
                            str(index): ShuffleBlock(
                                SHUFFLENET_CANDIDATES[index],
                                width,
                                factor * channels,
                                1 if layer else 2,
                                extras=space.extras,
                            )
                            for index in chosen
                        }
                    )
                )
                width = factor * channels
        self.last = nn.Sequential(*_pointwise(width, LAST_WIDTH * channels, nn.ReLU))
        self.classifier = nn.Linear(LAST_WIDTH * channels, classes)

    def forward(self, x: Tensor, architecture: ArchitectureString | None = None) -> Tensor:
        """x [B, in_channels, H, W]; only the layers' chosen blocks run."""
        x = self.features(x, architecture)[-1]
        return self.classifier(F.adaptive_avg_pool2d(self.last(x), 1).flatten(1))

    def features(self, x: Tensor, architecture: ArchitectureString | None = None) -> list[Tensor]:
        """The last map of each size: the stem's, then one a stage, each of half the size before it."""
        chosen = self.only if architecture is None else architecture.string
        if chosen is None:
            raise UserError("a supernet needs an architecture")
        maps = [self.stem(x)]
        for layer, index in zip(self.layers, chosen, strict=True):
            block = layer[str(index)]
            out = block(maps[-1])
            maps = [*maps, out] if block.stride == 2 else [*maps[:-1], out]
        return maps
