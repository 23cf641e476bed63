"""mixed_sum at the shapes of real supernets: the 8 candidates of an edge, and a node of the DARTS cell."""

from __future__ import annotations

import pytest
import torch

import fastnas
from fastnas.reference.mixed_sum import mixed_sum as reference

SHAPES = {
    "darts-8": (8, (64, 16, 32, 32), torch.float32),
    "darts-8-bf16": (8, (64, 16, 32, 32), torch.bfloat16),
    "pc-darts-8": (8, (256, 4, 32, 32), torch.float32),
    "node-32": (32, (16, 64, 8, 8), torch.float32),
    "tiny-8": (8, (4, 8, 4, 4), torch.float32),
}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("name", SHAPES)
def test_mixed_sum(race, name: str, backward: bool) -> None:
    go(race, name, backward)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("name", ["darts-8", "darts-8-bf16", "tiny-8"])
def test_each_backend_of_a_gpu(race, gpu_backend: str, name: str, backward: bool) -> None:
    go(race, name, backward)


def go(race, name: str, backward: bool) -> None:
    count, shape, dtype = SHAPES[name]
    xs = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(count)]
    weights = torch.softmax(torch.randn(count), 0).requires_grad_()
    # Forward reads the xs and writes y; backward reads g and the xs and writes as many gradients.
    maps = count + 1 + (2 * count + 1 if backward else 0)
    race(
        lambda w, *x: fastnas.mixed_sum(x, w),
        lambda w, *x: reference(x, w),
        [weights, *xs],
        backward=backward,
        traffic=maps * xs[0].nbytes,
        group=f"mixed_sum {name}",
    )
