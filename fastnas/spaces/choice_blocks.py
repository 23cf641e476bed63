"""The choice-block space of One-Shot as data (Bender et al. 2018, section 3.1)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from fastnas.errors import UserError
from fastnas.spaces.architecture import ArchitectureString

OPERATIONS = (
    "identity",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "sep_conv_7x7",
    "conv_1x7_7x1",
    "max_pool_3x3",
    "avg_pool_3x3",
)
MOST_OPERATIONS = 2  # of a block
OPERATION_SETS = tuple(
    chosen for size in range(1, MOST_OPERATIONS + 1) for chosen in itertools.combinations(range(len(OPERATIONS)), size)
)

Block = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class ChoiceBlockSpace:
    """One cell, of which all cells are copies, of `blocks` choice blocks.

    Block i reads at least one of 2 + i states (the two previous cells, then the blocks before it) and adds up one or
    two of the seven operations. An architecture string has two numbers a block: which subset of its states (the number
    plus one, as bits) and which set of operations. The number after the last set stands for all seven at once, and
    is never drawn: with it `all_on` is a string too.
    """

    blocks: int = 4

    name: ClassVar[str] = "choice_blocks"

    def __post_init__(self) -> None:
        if self.blocks < 1:
            raise UserError(f"a cell needs at least 1 choice block, got {self.blocks}")

    @property
    def choices(self) -> tuple[int, ...]:
        """(2^(2+i) - 1) subsets and 28 sets a block: about 6e9 cells of four blocks."""
        return tuple(size for i in range(self.blocks) for size in (2 ** (2 + i) - 1, len(OPERATION_SETS)))

    def cell(self, string: Sequence[int]) -> tuple[Block, ...]:
        """For each block the states that it reads and the indices of its operations."""
        blocks = []
        for block, (subset, operations) in enumerate(zip(string[::2], string[1::2], strict=True)):
            states = tuple(state for state in range(2 + block) if (subset + 1) >> state & 1)
            everything = operations == len(OPERATION_SETS)
            blocks.append((states, tuple(range(len(OPERATIONS))) if everything else OPERATION_SETS[operations]))
        return tuple(blocks)

    def decode(self, string: Sequence[int], *, rule: str = "") -> ArchitectureString:
        """Raises UserError for a string that is none of this space."""
        sizes = [size + place % 2 for place, size in enumerate(self.choices)]
        if len(string) != len(sizes) or any(number >= size for number, size in zip(string, sizes, strict=True)):
            raise UserError(f"genotype: {list(string)} is no cell of {self.blocks} choice blocks")
        lines = tuple(
            f"block {block} = {' + '.join(OPERATIONS[index] for index in operations)} "
            f"of {', '.join(_state(state) for state in states)}"
            for block, (states, operations) in enumerate(self.cell(string))
        )
        return ArchitectureString(self.name, tuple(string), lines, rule)

    def random_genotype(self, rng: random.Random) -> ArchitectureString:
        """Draw uniformly: every cell of the space is equally likely."""
        return self.decode([rng.randrange(size) for size in self.choices], rule="random")

    def all_on(self) -> ArchitectureString:
        """Every input and every operation of every block: the paper's baseline All On."""
        string = [number for i in range(self.blocks) for number in (2 ** (2 + i) - 2, len(OPERATION_SETS))]
        return self.decode(string, rule="all on")


def _state(state: int) -> str:
    return ("c_{k-2}", "c_{k-1}")[state] if state < 2 else f"block {state - 2}"
