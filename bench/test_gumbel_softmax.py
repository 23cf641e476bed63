"""gumbel_softmax of the 28 edges of a SNAS supernet, against what one writes with torch.nn.functional.

The rivals draw their noise as ``F.gumbel_softmax`` does and then add that of the op, so that the answers can be
compared. The compiler removes the draw, which is in its favour.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastnas
from fastnas.reference.gumbel_softmax import gumbel_from_bits, random_bits

SEED, TAU = 5, 0.7


def plain(logits: Tensor, noise: Tensor, hard: bool) -> Tensor:
    drawn = -torch.empty_like(logits).exponential_().log()
    del drawn
    y = ((logits + noise) / TAU).softmax(-1)
    if not hard:
        return y
    one_hot = torch.zeros_like(logits).scatter_(-1, y.max(-1, keepdim=True)[1], 1.0)
    return one_hot - y.detach() + y


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("rival", ["one-call", "cell-by-cell", "edge-by-edge"])
def test_all_edges(race, rival: str, hard: bool, backward: bool) -> None:
    go(race, rival, hard, backward)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_each_backend_of_a_gpu(race, gpu_backend: str, backward: bool) -> None:
    go(race, "one-call", False, backward)


def go(race, rival: str, hard: bool, backward: bool) -> None:
    logits = torch.randn(28, 8, requires_grad=True)
    noise = gumbel_from_bits(random_bits(logits.numel(), SEED), torch.float32).view(28, 8)
    parts = {"one-call": 1, "cell-by-cell": 2, "edge-by-edge": 28}[rival]

    def reference(logits: Tensor, noise: Tensor) -> Tensor:
        pairs = zip(logits.chunk(parts), noise.chunk(parts), strict=True)
        pieces = [plain(part, drawn, hard) for part, drawn in pairs]
        return pieces[0] if parts == 1 else torch.cat(pieces)

    race(
        lambda logits, _: fastnas.gumbel_softmax(logits, TAU, seed=SEED, hard=hard),
        reference,
        [logits, noise],
        backward=backward,
        traffic=None,
        group=f"gumbel_softmax 28 x 8 {'hard' if hard else 'soft'}, rival {rival}",
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_many_samples(race, backward: bool) -> None:
    logits = torch.randn(16_384, 8, requires_grad=True)
    noise = gumbel_from_bits(random_bits(logits.numel(), SEED), torch.float32).view(logits.shape)
    race(
        lambda logits, _: fastnas.gumbel_softmax(logits, TAU, seed=SEED),
        lambda logits, noise: plain(logits, noise, False),
        [logits, noise],
        backward=backward,
        traffic=None,
        group="gumbel_softmax 16384 x 8",
    )
