"""depthwise_bank at the edges of DARTS (batch 64) and PC-DARTS (K = 4, batch 256): four kernels, pools in some rows."""

from __future__ import annotations

import pytest
import torch

import fastnas
from fastnas.reference.depthwise_bank import depthwise_bank as reference

KERNELS = ((3, 1), (5, 1), (3, 2), (5, 2))  # size, dilation

# shape, stride, dtype, memory format, pools
BANKS = {
    "darts-16": ((64, 16, 32, 32), 1, torch.float32, torch.contiguous_format, False),
    "darts-32": ((64, 32, 16, 16), 1, torch.float32, torch.contiguous_format, False),
    "darts-64": ((64, 64, 8, 8), 1, torch.float32, torch.contiguous_format, False),
    "darts-16-reduce": ((64, 16, 32, 32), 2, torch.float32, torch.contiguous_format, False),
    "darts-16-pools": ((64, 16, 32, 32), 1, torch.float32, torch.contiguous_format, True),
    "pc-darts-4": ((256, 4, 32, 32), 1, torch.float32, torch.contiguous_format, False),
    "darts-16-channels-last": ((64, 16, 32, 32), 1, torch.float32, torch.channels_last, False),
    "darts-32-channels-last": ((64, 32, 16, 16), 1, torch.float32, torch.channels_last, False),
    "darts-64-channels-last": ((64, 64, 8, 8), 1, torch.float32, torch.channels_last, False),
    "darts-16-reduce-channels-last": ((64, 16, 32, 32), 2, torch.float32, torch.channels_last, False),
    "darts-16-pools-channels-last": ((64, 16, 32, 32), 1, torch.float32, torch.channels_last, True),
    "pc-darts-4-channels-last": ((256, 4, 32, 32), 1, torch.float32, torch.channels_last, False),
    "imagenet-48": ((16, 48, 28, 28), 1, torch.float32, torch.contiguous_format, False),
    "darts-16-bf16": ((64, 16, 32, 32), 1, torch.bfloat16, torch.contiguous_format, False),
}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("name", BANKS)
def test_bank(race, name: str, backward: bool) -> None:
    go(race, name, backward)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("name", ["darts-16", "darts-16-channels-last", "darts-16-reduce", "imagenet-48"])
def test_each_backend_of_a_gpu(race, gpu_backend: str, name: str, backward: bool) -> None:
    go(race, name, backward)


def go(race, name: str, backward: bool) -> None:
    shape, stride, dtype, layout, pools = BANKS[name]
    x = torch.randn(shape).to(dtype).to(memory_format=layout).requires_grad_()
    weights = [(torch.randn(shape[1], 1, k, k) / k).to(dtype).requires_grad_() for k, _ in KERNELS]
    options = {"dilations": [d for _, d in KERNELS], "stride": stride, "max_pool": pools, "avg_pool": pools}
    race(
        lambda x, *w: fastnas.depthwise_bank(x, w, **options),
        lambda x, *w: reference(x, w, **options),
        [x, *weights],
        backward=backward,
        traffic=None,  # arithmetic bounds it: 68 multiply-adds an element
        group=f"depthwise_bank {name}",
    )
