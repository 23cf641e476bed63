"""norm_mixed_sum at the shapes of real supernets, in training, against BatchNorm and a sum."""

from __future__ import annotations

import pytest
import torch

import fastnas
from fastnas.reference.norm_mixed_sum import norm_mixed_sum as reference

SHAPES = {
    "darts-4": (4, (64, 16, 32, 32), torch.contiguous_format, torch.float32),
    "darts-8": (8, (64, 16, 32, 32), torch.contiguous_format, torch.float32),
    "darts-4-last": (4, (64, 16, 32, 32), torch.channels_last, torch.float32),
    "darts-8-last": (8, (64, 16, 32, 32), torch.channels_last, torch.float32),
    "darts-8-bf16": (8, (64, 16, 32, 32), torch.contiguous_format, torch.bfloat16),
    "pc-darts-4": (4, (256, 4, 32, 32), torch.contiguous_format, torch.float32),
    "pc-darts-8": (8, (256, 4, 32, 32), torch.contiguous_format, torch.float32),
    "reduced-4": (4, (64, 64, 8, 8), torch.contiguous_format, torch.float32),
    "reduced-4-last": (4, (64, 64, 8, 8), torch.channels_last, torch.float32),
    "tiny-8": (8, (4, 8, 4, 4), torch.contiguous_format, torch.float32),
}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("name", SHAPES)
def test_norm_mixed_sum(race, name: str, backward: bool) -> None:
    count, shape, layout, dtype = SHAPES[name]
    ys = [torch.randn(shape).to(dtype).to(memory_format=layout).requires_grad_() for _ in range(count)]
    weights = torch.softmax(torch.randn(count), 0).requires_grad_()
    # Forward reads the ys twice and writes y; backward reads g and the ys twice and writes as many gradients.
    maps = 2 * count + 1 + (2 * (count + 1) + count if backward else 0)
    race(
        lambda w, *y: fastnas.norm_mixed_sum(y, w),
        lambda w, *y: reference(y, w),
        [weights, *ys],
        backward=backward,
        traffic=maps * ys[0].nbytes,
        group=f"norm_mixed_sum {name}",
    )
