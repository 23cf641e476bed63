"""The DARTS cell space as data: nodes, edges, candidates (Liu et al. 2019, section 2.1)."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from fastnas.errors import UserError
from fastnas.nn.candidates import candidate_names
from fastnas.spaces.genotype import Genotype, Node

DARTS_CANDIDATES = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)


@dataclass(frozen=True)
class DartsSpace:
    """Cells of `nodes` intermediate nodes; node i takes every earlier state 0 .. i+1 as a possible input.

    States 0 and 1 are the outputs of the two previous cells, state 2+i is node i, and the cell's output is the
    concatenation of its nodes. Edges are numbered node by node: edge `edge_slice(i).start + j` goes from state j
    to node i.
    """

    nodes: int = 4
    candidates: tuple[str, ...] = DARTS_CANDIDATES

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise UserError(f"a cell needs at least 1 node, got nodes={self.nodes}")
        unknown = [name for name in self.candidates if name not in candidate_names()]
        if unknown:
            raise UserError(f"unknown candidate {unknown[0]!r}; registered are {', '.join(candidate_names())}")
        if all(name == "none" for name in self.candidates) or len(set(self.candidates)) != len(self.candidates):
            raise UserError("a space needs distinct candidates, and at least one besides 'none'")

    @property
    def num_edges(self) -> int:
        """14 for four nodes."""
        return sum(2 + node for node in range(self.nodes))

    @property
    def num_reduction_edges(self) -> int:
        """Those of the reduction cell, which is searched too."""
        return self.num_edges

    def edge_slice(self, node: int) -> slice:
        """The edges that end in `node`: (0,2), (2,5), (5,9), (9,14) for four nodes."""
        start = sum(2 + earlier for earlier in range(node))
        return slice(start, start + 2 + node)

    @property
    def sources(self) -> tuple[int, ...]:
        """Source state of each edge."""
        return tuple(source for node in range(self.nodes) for source in range(2 + node))

    @property
    def concat(self) -> tuple[int, ...]:
        """States whose concatenation is the cell's output: all nodes."""
        return tuple(range(2, 2 + self.nodes))

    @property
    def candidates_without_none(self) -> tuple[str, ...]:
        return tuple(name for name in self.candidates if name != "none")

    @property
    def choices(self) -> tuple[int, ...]:
        """Number of choices at each place of an architecture string: see `decode`."""
        pairs_and_operations = [
            size
            for node in range(self.nodes)
            for size in (math.comb(2 + node, 2), len(self.candidates_without_none), len(self.candidates_without_none))
        ]
        return tuple(2 * pairs_and_operations)

    def decode(self, string: Sequence[int], *, rule: str = "") -> Genotype:
        """The genotype of an architecture string, one number below `choices` a place.

        A node has three places: which two of its possible inputs (in the order of itertools.combinations), and a
        candidate but `none` on each. The nodes of the normal cell come first, then those of the reduction cell.
        """
        names = self.candidates_without_none
        nodes: list[Node] = []
        for place in range(0, len(string), 3):
            pair, first, second = string[place : place + 3]
            inputs = list(itertools.combinations(range(2 + len(nodes) % self.nodes), 2))[pair]
            nodes.append(((names[first], inputs[0]), (names[second], inputs[1])))
        return Genotype(tuple(nodes[: self.nodes]), tuple(nodes[self.nodes :]), self.concat, self.concat, rule=rule)

    def free_edges(self, normal: Sequence[int], reduce: Sequence[int], *, rule: str = "") -> Genotype:
        """The genotype in which every edge has the candidate of this index; `none` drops it. [E] numbers a cell."""

        def cell(chosen: Sequence[int]) -> tuple[Node, ...]:
            pairs = [(self.candidates[index], source) for index, source in zip(chosen, self.sources, strict=True)]
            return tuple(tuple(pairs[self.edge_slice(node)]) for node in range(self.nodes))

        return Genotype(cell(normal), cell(reduce), self.concat, self.concat, rule=rule)

    def random_genotype(self, rng: random.Random) -> Genotype:
        """Draw uniformly: two distinct inputs a node, any candidate but `none` on each."""

        def cell() -> tuple[Node, ...]:
            return tuple(
                tuple(
                    (rng.choice(self.candidates_without_none), source)
                    for source in sorted(rng.sample(range(2 + node), 2))
                )
                for node in range(self.nodes)
            )

        return Genotype(cell(), cell(), self.concat, self.concat, rule="random")


def reduction_cells(cells: int) -> tuple[int, int]:
    """Positions of the two reduction cells in a network of `cells` cells: at a third and at two thirds."""
    return cells // 3, 2 * cells // 3
