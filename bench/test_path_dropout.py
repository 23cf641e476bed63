"""path_dropout at the fan-ins of the One-Shot space, half of the paths dropped, a mask a ghost batch of 32."""

from __future__ import annotations

import pytest
import torch

import fastnas
from fastnas.reference.path_dropout import path_dropout as reference

SHAPES = {
    "one-shot-8": (8, (64, 16, 32, 32), torch.float32),
    "one-shot-8-bf16": (8, (64, 16, 32, 32), torch.bfloat16),
    "one-shot-7-deep": (7, (64, 64, 8, 8), torch.float32),
}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("name", SHAPES)
def test_path_dropout(race, name: str, backward: bool) -> None:
    paths, shape, dtype = SHAPES[name]
    xs = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(paths)]
    mask = (torch.arange(paths) + torch.arange(shape[0] // 32).view(-1, 1)) % 2 == 0
    kept = mask.float().mean().item() * paths
    # Forward reads the kept paths and writes y; backward reads g and writes every gradient.
    maps = kept + 1 + (paths + 1 if backward else 0)
    race(
        lambda m, *x: fastnas.path_dropout(x, m),
        lambda m, *x: reference(x, m),
        [mask, *xs],
        backward=backward,
        traffic=int(maps * xs[0].nbytes),
        group=f"path_dropout {name}",
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_drop_path(race, backward: bool) -> None:
    x = torch.randn(96, 36, 32, 32, requires_grad=True)
    scale = (torch.arange(96) % 5 != 0).float() / 0.8
    kept = scale.count_nonzero().item() / 96
    race(
        lambda s, x: fastnas.path_dropout([x], s.view(-1, 1)),
        lambda s, x: x * s.view(-1, 1, 1, 1),
        [scale, x],
        backward=backward,
        traffic=int((kept + 1) * x.nbytes * (2 if backward else 1)),
        group="drop_path retrain-96",
    )
