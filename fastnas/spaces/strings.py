"""How a search moves through architecture strings: draws, mutations and crossovers."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

String = tuple[int, ...]


class Strings(Protocol):
    """The strings of a space; what it gives is valid."""

    @property
    def choices(self) -> Sequence[int]:
        """Number of values of each place."""

    @property
    def entropy(self) -> float:
        """Of `random_string`, in nats."""

    def is_valid(self, string: Sequence[int]) -> bool:
        """Whether a string of such values is an architecture."""

    def random_string(self, rng: random.Random) -> String:
        """U(alpha)."""

    def mutate(self, string: String, rate: float, rng: random.Random) -> String:
        """Change a string a little; `rate`: the probability that a place is drawn anew."""

    def cross(self, first: String, second: String, rng: random.Random) -> String:
        """Mix two strings."""


@dataclass(frozen=True)
class FreeStrings:
    """Strings whose places are free: each of them is an architecture."""

    choices: tuple[int, ...]

    @property
    def entropy(self) -> float:
        return sum(map(math.log, self.choices))

    def is_valid(self, string: Sequence[int]) -> bool:
        return True

    def random_string(self, rng: random.Random) -> String:
        """Draw uniformly."""
        return tuple(rng.randrange(size) for size in self.choices)

    def mutate(self, string: String, rate: float, rng: random.Random) -> String:
        """Draw each place anew with probability `rate`."""
        places = zip(string, self.choices, strict=True)
        return tuple(rng.randrange(size) if rng.random() < rate else old for old, size in places)

    def cross(self, first: String, second: String, rng: random.Random) -> String:
        """Take each place from either parent with equal probability."""
        return tuple(rng.choice(pair) for pair in zip(first, second, strict=True))
