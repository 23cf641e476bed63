"""What a data set is before it is split: its labels, and how to build the stores that hold its pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastnas.data.augment import channel_statistics
from fastnas.data.resident import Resident, resize
from fastnas.data.stream import Store
from fastnas.errors import UserError

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation per channel


class Source(Protocol):
    """labels, test_labels: int64 [N], [M]. flip: whether mirror images keep their class."""

    name: str
    labels: Tensor
    test_labels: Tensor
    flip: bool

    def side(self) -> int:
        """Side of the images when none is asked for."""
        ...

    def stores(self, size: int, device: torch.device, workers: int) -> tuple[Store, Store, Statistics]:
        """Training store, test store, and the statistics of the training images, at `size` x `size`
        pixels."""
        ...


@dataclass(frozen=True)
class Arrays:
    """A data set in memory. images, test_images: uint8 [N, C, H, W]; statistics: published ones for the
    original size."""

    name: str
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    flip: bool = True
    statistics: Statistics | None = None

    def side(self) -> int:
        """See Source.side; raises UserError for images that are not square."""
        height, width = self.images.shape[2:]
        if height != width:
            raise UserError(
                f"{self.name} has images of {height} x {width} pixels: give --image-size to make them square"
            )
        return height

    def stores(self, size: int, device: torch.device, workers: int) -> tuple[Store, Store, Statistics]:
        """See Source.stores."""
        published = self.statistics if self.images.shape[2:] == (size, size) else None
        images = resize(self.images, size)
        train = Resident(images, self.labels, device)
        test = Resident(resize(self.test_images, size), self.test_labels, device)
        return train, test, published or channel_statistics(images)
