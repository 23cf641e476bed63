"""The NASNet-like space of VAENAS as data: every edge of a cell chooses for itself (VAENAS, appendix A.4)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from fastnas.spaces.darts import DartsSpace
from fastnas.spaces.genotype import Genotype

NASNET_CANDIDATES = (
    "none",
    "avg_pool_3x3",
    "max_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "sep_conv_7x7",
    "dil_conv_3x3",
)


@dataclass(frozen=True)
class NasnetSpace(DartsSpace):
    """Cells in which a node may have any number of inputs: each edge takes any candidate, and `none` drops it.

    Four nodes have 14 free edges a cell and 8^28 architectures. An architecture string has one number an edge, of the
    normal cell and then of the reduction cell: the index of its candidate.
    """

    candidates: tuple[str, ...] = NASNET_CANDIDATES

    @property
    def choices(self) -> tuple[int, ...]:
        return (len(self.candidates),) * (2 * self.num_edges)

    def decode(self, string: Sequence[int], *, rule: str = "") -> Genotype:
        return self.free_edges(string[: self.num_edges], string[self.num_edges :], rule=rule)

    def random_genotype(self, rng: random.Random) -> Genotype:
        """Draw uniformly: any candidate, `none` among them, on every edge."""
        return self.decode([rng.randrange(size) for size in self.choices], rule="random")
