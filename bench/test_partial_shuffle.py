"""partial_shuffle at the edges of a PC-DARTS supernet: 8 candidates, K = 4, batch 256; and as ShuffleNet's shuffle."""

from __future__ import annotations

import pytest
import torch

import fastnas
from fastnas.reference.partial_shuffle import partial_shuffle as reference

# channels, map size, stride, dtype, memory format
EDGES = {
    "normal-16": (16, 32, 1, torch.float32, torch.contiguous_format),
    "reduce-16": (16, 32, 2, torch.float32, torch.contiguous_format),
    "normal-32": (32, 16, 1, torch.float32, torch.contiguous_format),
    "normal-64": (64, 8, 1, torch.float32, torch.contiguous_format),
    "normal-16-channels-last": (16, 32, 1, torch.float32, torch.channels_last),
    "reduce-16-channels-last": (16, 32, 2, torch.float32, torch.channels_last),
    "normal-16-bf16": (16, 32, 1, torch.bfloat16, torch.contiguous_format),
}
BACKWARD = pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])


@BACKWARD
@pytest.mark.parametrize("name", EDGES)
def test_edge(race, name: str, backward: bool) -> None:
    channels, size, stride, dtype, layout = EDGES[name]
    paths, count, out = 8, channels // 4, size // stride

    def draw(c: int, n: int) -> torch.Tensor:
        return torch.randn(256, c, n, n).to(dtype).to(memory_format=layout)

    mixed = [draw(count, out).requires_grad_() for _ in range(paths)]
    bypass = draw(channels, size)[:, count:].requires_grad_()
    weights = torch.softmax(torch.randn(paths), 0).requires_grad_()
    maps, rest, y = paths * mixed[0].nbytes, bypass.numel() * bypass.element_size(), channels * mixed[0].nbytes // count
    traffic = maps + rest + y
    if backward:  # reads g, the mixed maps and, to find the maxima, the bypass; writes every gradient
        traffic += y + 2 * maps + rest * stride
    race(
        lambda w, b, *m: fastnas.partial_shuffle(m, w, b, stride=stride),
        lambda w, b, *m: reference(m, w, b, stride=stride),
        [weights, bypass, *mixed],
        backward=backward,
        traffic=traffic,
        group=f"partial_shuffle {name}",
    )


@BACKWARD
def test_channel_shuffle(race, backward: bool) -> None:
    left, right = (torch.randn(64, 58, 28, 28, requires_grad=True) for _ in range(2))
    race(
        lambda a, b: fastnas.partial_shuffle([a], None, b),
        lambda a, b: torch.cat([a, b], 1).view(64, 2, 58, 28, 28).transpose(1, 2).reshape(64, 116, 28, 28),
        [left, right],
        backward=backward,
        traffic=4 * left.nbytes * (2 if backward else 1),
        group="partial_shuffle shufflenet-116",
    )
