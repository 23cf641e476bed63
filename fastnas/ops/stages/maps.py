"""Images [B, C, H, W] as the maps [B, H, W, C] of the stages, and back."""

from __future__ import annotations

from torch import Tensor


def maps(x: Tensor) -> Tensor:
    """[B, C, H, W] as [B, H, W, C] with neighbouring channels; a copy only of what is not laid out like that."""
    x = x.permute(0, 2, 3, 1)
    _, height, width, channels = x.shape
    pixel = x.stride(2) if width > 1 else x.stride(1) if height > 1 else channels
    wanted = (height * width * pixel, width * pixel, pixel, 1)
    regular = all(size == 1 or have == want for size, have, want in zip(x.shape, x.stride(), wanted, strict=True))
    return x if regular and pixel >= channels else x.contiguous()


def images(x: Tensor) -> Tensor:
    """[B, H, W, C] as [B, C, H, W]."""
    return x.permute(0, 3, 1, 2)
