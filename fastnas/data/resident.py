"""Small data sets: every image on the device as uint8, batches gathered by index."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnas.data.augment import Recipe, crop_and_flip
from fastnas.data.stream import Plan


class Resident:
    """images: uint8 [N, C, S, S]; labels: int64 [N]; both moved to `device` once."""

    def __init__(self, images: Tensor, labels: Tensor, device: torch.device) -> None:
        self.images = images.to(device)
        self.labels = labels.cpu()
        self.image_size = images.shape[-1]
        self.device = device
        self._device_labels = labels.to(device)

    def fetch(self, plans: Iterable[Plan], recipe: Recipe) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """See stream.Store.fetch."""
        for plan in plans:
            if plan.draws is None:
                rows = self._to_device(plan.rows)
                yield self.images[rows], self._device_labels[rows], None
            else:
                # Rows and draws travel together: one copy, and from pinned memory no wait for the device.
                table = self._to_device(torch.cat([plan.rows[None], plan.draws]))
                rows, draws = table[0], table[1:]
                yield crop_and_flip(self.images[rows], draws, recipe.pad), self._device_labels[rows], draws

    def contents(self) -> Iterator[bytes | memoryview]:
        """Shape, pixels and labels."""
        yield str(tuple(self.images.shape)).encode()
        for tensor in (self.images, self.labels):
            yield tensor.cpu().contiguous().view(torch.uint8).numpy().data.cast("B")

    def _to_device(self, table: Tensor) -> Tensor:
        if self.device.type == "cuda":
            table = table.pin_memory()
        return table.to(self.device, non_blocking=True)


def resize(images: Tensor, size: int) -> Tensor:
    """The largest centred square, resized bilinearly: uint8 [N, C, H, W] to [N, C, size, size]."""
    side = min(images.shape[2:])
    top, left = (images.shape[2] - side) // 2, (images.shape[3] - side) // 2
    square = images[:, :, top : top + side, left : left + side]
    if side == size:
        return square.contiguous()
    # In chunks: the float32 copy of a whole set would be four times its size.
    parts = [
        F.interpolate(part.float(), size=(size, size), mode="bilinear", antialias=True).round_().clamp_(0, 255).byte()
        for part in square.split(1024)
    ]
    return torch.cat(parts)
