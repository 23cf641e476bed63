"""A problem small enough to search in float64 within a test."""

from __future__ import annotations

import pytest
import torch

from fastnas.methods import Problem, WeightSettings
from fastnas.spaces import DartsSpace

SPACE = DartsSpace(nodes=2, candidates=("none", "avg_pool_3x3", "skip_connect", "sep_conv_3x3"))


@pytest.fixture
def problem() -> Problem:
    weights = WeightSettings(epochs=10, batch_size=4, channels=4, cells=3, nodes=2, lr=0.1, lr_min=0.0)
    return Problem(SPACE, 3, 2, weights, torch.device("cpu"), seed=0)


@pytest.fixture
def batches() -> tuple:
    """A training batch and a search batch, float64."""
    generator = torch.Generator().manual_seed(5)

    def batch():
        x = torch.randn(4, 2, 6, 6, generator=generator, dtype=torch.double)
        return x, torch.randint(3, (4,), generator=generator)

    return batch(), batch()
