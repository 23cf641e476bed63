"""The ShuffleNet-like chain as data (Guo et al. 2020; VAENAS, appendix A.4)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fastnas.errors import UserError
from fastnas.spaces.architecture import ArchitectureString

SHUFFLENET_CANDIDATES = ("shuffle_3x3", "shuffle_5x5", "shuffle_7x7", "xception_3x3")
STAGE_SHARES = (4, 4, 8, 4)  # of 20 layers


@dataclass(frozen=True)
class ShufflenetSpace:
    """A chain of `layers` blocks in four stages, each block one of four: 4^20 architectures for 20 layers.

    An architecture string has one number a layer. Layers are a multiple of five, or four for a small chain of one layer
    a stage. `extras`: the blocks with squeeze-and-excitation and Swish of VAENAS, another network of the same choices.
    """

    layers: int = 20
    extras: bool = False

    name: ClassVar[str] = "shufflenet"

    def __post_init__(self) -> None:
        if self.layers != 4 and self.layers % 5 or self.layers < 4:
            raise UserError(f"a ShuffleNet-like chain has 4, 5, 10, 15, 20, ... layers, got {self.layers}")

    @property
    def label(self) -> str:
        """What its genotypes name: the network differs with the extras."""
        return "shufflenet_se" if self.extras else "shufflenet"

    @property
    def stages(self) -> tuple[int, ...]:
        """Layers of each stage, the first of which halves the image: (4, 4, 8, 4) for 20."""
        return (1, 1, 1, 1) if self.layers == 4 else tuple(self.layers * share // 20 for share in STAGE_SHARES)

    @property
    def choices(self) -> tuple[int, ...]:
        return (len(SHUFFLENET_CANDIDATES),) * self.layers

    def decode(self, string: Sequence[int], *, rule: str = "") -> ArchitectureString:
        """Raises UserError for a string that is none of this space."""
        if len(string) != self.layers or any(not 0 <= number < len(SHUFFLENET_CANDIDATES) for number in string):
            raise UserError(f"genotype: {list(string)} is no chain of {self.layers} layers with numbers from 0 to 3")
        lines = tuple(f"layer {layer} = {SHUFFLENET_CANDIDATES[number]}" for layer, number in enumerate(string))
        return ArchitectureString(self.label, tuple(string), lines, rule)

    def random_genotype(self, rng: random.Random) -> ArchitectureString:
        """Draw uniformly."""
        return self.decode([rng.randrange(size) for size in self.choices], rule="random")
