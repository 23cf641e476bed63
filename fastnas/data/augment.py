"""What is done to the pixels of a batch: all images at once, on the device they live on.

The usual recipe on CIFAR (He et al., 2016, section 4.2): crop of the zero-padded image and horizontal flip;
then normalisation, and cutout (DeVries and Taylor, 2017), which writes the mean colour.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of the table of draws: crop offset (vertical, horizontal), flip, cutout centre (vertical, horizontal),
# and a number that seeds the sample's own transforms when images are streamed from files.
TOP, LEFT, FLIP, CENTRE_Y, CENTRE_X, SAMPLE_SEED = range(6)


@dataclass(frozen=True)
class Recipe:
    """mean, std: per channel, for pixels scaled to 0..1. pad: pixels of zero padding of the random crop.
    flip: whether images may be mirrored. cutout: side of the square that is blanked, 0 for none."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int
    flip: bool
    cutout: int


def draw(count: int, size: int, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """All random numbers of a batch of `count` images of side `size`, in one call: int64 [6, count]."""
    window = 2 * recipe.pad + 1
    ranges = torch.tensor([window, window, 1 + recipe.flip, size, size, 1 << 53], dtype=torch.float64)
    uniform = torch.rand(6, count, dtype=torch.float64, generator=generator)
    return (uniform * ranges[:, None]).long()


def crop_and_flip(images: Tensor, draws: Tensor, pad: int) -> Tensor:
    """Random crop with zero padding, then mirror.

    images: uint8 [B, C, H, W]; draws: int64 [6, B]; returns uint8 [B, C, H, W]. Pixel (i, j) of an output
    image is pixel (top + i, left + j) of its padded image, or (top + i, left + W-1-j) when mirrored: one
    gather does both."""
    size, width = images.shape[2:]
    padded = F.pad(images, (pad, pad, pad, pad))
    columns = torch.arange(width, device=images.device)
    mirrored = torch.where(draws[FLIP, :, None] > 0, width - 1 - columns, columns)  # [B, W]
    row = draws[TOP, :, None] + torch.arange(size, device=images.device)  # [B, H]
    column = draws[LEFT, :, None] + mirrored
    source = row[:, :, None] * padded.shape[3] + column[:, None, :]  # [B, H, W]
    source = source.flatten(1)[:, None, :].expand(-1, images.shape[1], -1)
    return padded.flatten(2).gather(2, source).view_as(images)


def normalise(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """uint8 [B, C, H, W] to float32 of mean 0 and deviation 1; scale, shift: see `affine`."""
    return images.to(torch.float32).mul_(scale).add_(shift)


def affine(recipe: Recipe, device: torch.device) -> tuple[Tensor, Tensor]:
    """(x/255 - mean)/std as x*scale + shift: two float32 tensors [C, 1, 1]."""
    mean = torch.tensor(recipe.mean, dtype=torch.float64)[:, None, None]
    std = torch.tensor(recipe.std, dtype=torch.float64)[:, None, None]
    return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)


def cutout_(x: Tensor, draws: Tensor, length: int) -> Tensor:
    """Set a square of side `length`, clipped at the border, to 0 in place. x: [B, C, H, W], normalised."""
    inside = []
    for centre, size in ((draws[CENTRE_Y], x.shape[2]), (draws[CENTRE_X], x.shape[3])):
        offset = torch.arange(size, device=x.device) - (centre[:, None] - length // 2)  # [B, size]
        inside.append((offset >= 0) & (offset < length))
    return x.masked_fill_((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0.0)


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Exact mean and standard deviation per channel of uint8 [N, C, H, W], for pixels scaled to 0..1.

    A constant channel gets a standard deviation of one grey level, so that it normalises to 0 and not to NaN.
    """
    level = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in images.unbind(1):
        # In chunks: bincount widens its input to int64.
        counts = sum(torch.bincount(part.reshape(-1), minlength=256) for part in channel.split(4096))
        share = counts.double() / channel.numel()
        mean = float((share * level).sum())
        variance = float((share * (level - mean) ** 2).sum())
        means.append(mean)
        deviations.append(max(variance**0.5, 1 / 255))
    return tuple(means), tuple(deviations)
