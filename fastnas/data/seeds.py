"""Seeds that are pure functions of named integers, so that no random state has to be saved for a resume."""

from __future__ import annotations

from enum import IntEnum

import torch

_WORD = (1 << 64) - 1


class Use(IntEnum):
    """What a seed is used for; the first integer of every seed, so that no two uses share random numbers."""

    TEST_SPLIT = 1
    SEARCH_SPLIT = 2
    ORDER = 3
    DRAWS = 4
    SAMPLE = 5
    TRAIN_SUBSET = 6


def mix(*values: int) -> int:
    """Hash integers into one seed in [0, 2**63): a chain of splitmix64 steps (Steele et al., 2014)."""
    state = 0
    for value in values:
        state = ((state ^ (value & _WORD)) + 0x9E3779B97F4A7C15) & _WORD
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _WORD
        state ^= state >> 31
    return state >> 1


def generator(*values: int) -> torch.Generator:
    """A generator seeded from the integers; on the CPU, so that batches are the same on every device."""
    return torch.Generator().manual_seed(mix(*values))
