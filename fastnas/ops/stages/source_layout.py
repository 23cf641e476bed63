"""What leaves one state of a cell, as data: stages, terms, and where their results are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor

from fastnas.ops.stages.conv_stage import PART

STAGES = ("state", "pool", "first", "second")  # what a term is the output of


@dataclass
class Convolutions:
    """The parts of a conv_stage. `sides`: of each one's depthwise kernel, 0 where it has none; `widths`: of each the
    channels that it makes; `outputs`: how many there are."""

    parts: list[int] = field(default_factory=list)
    sides: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    outputs: int = 0

    def shapes(self, channels: int) -> list[tuple[int, ...]]:
        """Of the weights for maps of so many channels, part by part and depthwise before pointwise."""
        pairs = zip(self.sides, self.widths, strict=True)
        both = [((channels, 1, side, side), (width, channels, 1, 1)) for side, width in pairs]
        return [shape for pair in both for shape in pair if shape[-1]]

    @property
    def flat_shapes(self) -> list[int]:
        """Side and width of each part in turn, as the flat ops take them."""
        return [number for pair in zip(self.sides, self.widths, strict=True) for number in pair]

    def size(self, channels: int) -> int:
        """How many numbers these weights are."""
        return sum(map(math.prod, self.shapes(channels)))

    def split(self, flat: Tensor, channels: int) -> list[Tensor]:
        """The weights that lie end to end in `flat`, as views."""
        shapes = self.shapes(channels)
        parts = flat.split([math.prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def parted(self, weights: Sequence[Tensor], channels: int) -> list[Tensor]:
        """The weights one by one, given so or as one row."""
        return self.split(weights[0], channels) if len(weights) == 1 and weights[0].dim() == 1 else list(weights)

    def arranged(self, weights: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Weights, in the order of `shapes`, as the depthwise and pointwise arguments of the op."""
        given = iter(weights)
        none = weights[0].new_empty(0)
        pairs = [(next(given) if side else none, next(given)) for side in self.sides]
        return [depthwise for depthwise, _ in pairs], [pointwise for _, pointwise in pairs]


@dataclass(frozen=True)
class Term:
    """One weighted candidate of one edge; its map is number `index` of the `stage`, its node number `node` of those
    that the state leads to."""

    edge: int
    candidate: int
    node: int
    stage: str
    index: int


@dataclass
class Layout:
    """What leaves a state.

    `first` reads the state itself: convolutions (of the separable ones the first half) and strided identities;
    `second` are the other halves, which read outputs `second_from` of the first stage. `nodes`: how many the terms go
    to. Norms have one row for no normalisation, one for each pool of each edge, for the outputs of the first stage, for
    those of the second.
    """

    stride: int
    nodes: int
    first: Convolutions
    second: Convolutions
    second_from: list[int]
    terms: list[Term]
    _indices: dict[torch.device, Indices] = field(default_factory=dict, repr=False)

    @cached_property
    def rows(self) -> int:
        """Rows of the norms, the first one included."""
        return 1 + len(self.of_stage("pool")) + self.first.outputs + self.second.outputs

    def of_stage(self, stage: str) -> list[int]:
        """Numbers of the terms whose maps that stage makes."""
        return self._by_stage[stage]

    @cached_property
    def _by_stage(self) -> dict[str, list[int]]:
        return {stage: [n for n, term in enumerate(self.terms) if term.stage == stage] for stage in STAGES}

    @cached_property
    def of_node(self) -> list[list[int]]:
        """Numbers of the terms of each node."""
        return [[n for n, term in enumerate(self.terms) if term.node == node] for node in range(self.nodes)]

    def indices(self, device: torch.device) -> Indices:
        """Index tensors on `device`, made once."""
        if device not in self._indices:
            self._indices[device] = Indices(self, device)
        return self._indices[device]

    @cached_property
    def packed(self) -> list[int]:
        """The layout as the flat op takes it."""
        numbers = [self.stride, self.first.outputs, self.second.outputs, self.nodes]
        for stage in (self.first, self.second):
            numbers.append(len(stage.sides))
            for part, shape in enumerate(zip(stage.sides, stage.widths, strict=True)):
                numbers += [*shape, *stage.parts[part * PART : (part + 1) * PART]]
        numbers += [len(self.second_from), *self.second_from, len(self.terms)]
        for term in self.terms:
            numbers += [term.edge, term.candidate, term.node, STAGES.index(term.stage), term.index]
        return numbers

    def size(self, channels: int) -> int:
        """How many numbers the weights of both stages are."""
        return self.first.size(channels) + self.second.size(channels)

    def by_stage(self, weights: Sequence[Tensor], channels: int) -> tuple[list[Tensor], list[Tensor]]:
        """The weights of each stage one by one, given so or as one row."""
        if len(weights) == 1 and weights[0].dim() == 1:
            rows = weights[0].split([self.first.size(channels), self.second.size(channels)])
            return self.first.split(rows[0], channels), self.second.split(rows[1], channels)
        count = len(self.first.shapes(channels))
        return list(weights[:count]), list(weights[count:])

    @classmethod
    def unpack(cls, packed: Sequence[int]) -> Layout:
        numbers = iter(packed)

        def convolutions(outputs: int) -> Convolutions:
            stage = Convolutions(outputs=outputs)
            for _ in range(next(numbers)):
                stage.sides.append(next(numbers))
                stage.widths.append(next(numbers))
                stage.parts += islice(numbers, PART)
            return stage

        stride, first, second, nodes = islice(numbers, 4)
        stages = convolutions(first), convolutions(second)
        second_from = list(islice(numbers, next(numbers)))
        terms = []
        for _ in range(next(numbers)):
            edge, candidate, node, stage, index = islice(numbers, 5)
            terms.append(Term(edge, candidate, node, STAGES[stage], index))
        return cls(stride, nodes, *stages, second_from, terms)


class Indices:
    """Where things are, as index tensors.

    Of each term: `edges`, `candidates`, `rows` (of the norms). `second_from`: outputs of the first stage that the
    second reads, `second_rows` their rows. `pool_terms`, `pool_columns`: terms that are pools, and which pool.
    `through_terms`, `through_nodes`, `through_columns`: terms that are pools (0, 1) or the state itself (2).
    `direct_terms`, `direct_outputs`: terms that are outputs of the first stage. `second_terms`.
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        def index(numbers: Sequence[int]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.long, device=device)

        terms, pools, direct = layout.terms, layout.of_stage("pool"), layout.of_stage("first")
        first = 1 + len(pools)
        start = {"state": 0, "first": first, "second": first + layout.first.outputs}
        rows = [1 + pools.index(n) if t.stage == "pool" else start[t.stage] + t.index for n, t in enumerate(terms)]
        through = [number for number, term in enumerate(terms) if term.stage in ("pool", "state")]
        self.edges = index([term.edge for term in terms])
        self.candidates = index([term.candidate for term in terms])
        self.rows = index(rows)
        self.second_from = index(layout.second_from)
        self.second_rows = self.second_from + first
        self.pool_terms = index(pools)
        self.pool_columns = index([terms[number].index for number in pools])
        self.through_terms = index(through)
        self.through_nodes = index([terms[number].node for number in through])
        self.through_columns = index([2 if terms[n].stage == "state" else terms[n].index for n in through])
        self.direct_terms = index(direct)
        self.direct_outputs = index([terms[number].index for number in direct])
        self.second_terms = index(layout.of_stage("second"))


def end_to_end(weights: Sequence[Tensor], like: Tensor) -> Tensor:
    """The weights as one row, of `like` where there are none; no copy where they are one tensor."""
    if len(weights) == 1:
        return weights[0].reshape(-1)
    return torch.cat([weight.reshape(-1) for weight in weights]) if weights else like.new_empty(0)
