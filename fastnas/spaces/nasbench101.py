"""The cell space of NAS-Bench-101 as data (Ying et al. 2019), VAENAS's way to draw from it, and its table."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import ClassVar

import numpy as np

from fastnas._npz import read_arrays
from fastnas.errors import UserError
from fastnas.spaces.architecture import ArchitectureString

NASBENCH101_CANDIDATES = ("conv3x3", "conv1x1", "maxpool3x3")
VERTICES, MAX_EDGES = 7, 9
PAIRS = tuple((source, target) for target in range(1, VERTICES) for source in range(target))  # 21, bit by bit
TEST_IMAGES = 29952  # of three runs
MAX_ROWS = 1_000_000  # the benchmark has 423,624

Cell = tuple[tuple[tuple[int, int], ...], tuple[int, ...]]


@dataclass(frozen=True)
class Nasbench101Space:
    """Directed acyclic cells of up to seven vertices (0 the input, 6 the output), nine edges and three operations.

    An architecture string has 21 bits, one an edge x -> y in the order of y and then x, and the operations of
    vertices 1 to 5 (VAENAS, appendix A.5). A string is valid with at most nine edges and a path from input to output.
    """

    name: ClassVar[str] = "nasbench101"

    @property
    def choices(self) -> tuple[int, ...]:
        return (2,) * len(PAIRS) + (len(NASBENCH101_CANDIDATES),) * (VERTICES - 2)

    @property
    def entropy(self) -> float:
        """Of `random_string` in nats, but for the cells that are drawn again."""
        operations = (VERTICES - 2) * math.log(len(NASBENCH101_CANDIDATES))
        return math.log(math.comb(len(PAIRS), MAX_EDGES)) + operations

    def is_valid(self, string: Sequence[int]) -> bool:
        """At most nine edges, and one path at least connects input and output."""
        return sum(string[: len(PAIRS)]) <= MAX_EDGES and bool(self.prune(string)[0])

    def prune(self, string: Sequence[int]) -> Cell:
        """Edges and operations of what lies on a path from input to output, its vertices numbered anew from 0.

        No edges when there is no path.
        """
        edges = [pair for pair, bit in zip(PAIRS, string[: len(PAIRS)], strict=True) if bit]
        reached, needed = {0}, {VERTICES - 1}
        for source, target in edges:  # in the order of targets
            if source in reached:
                reached.add(target)
        for source, target in reversed(edges):
            if target in needed:
                needed.add(source)
        kept = sorted(reached & needed)
        if VERTICES - 1 not in reached:
            return (), ()
        number = {vertex: index for index, vertex in enumerate(kept)}
        pairs = tuple((number[s], number[t]) for s, t in edges if s in number and t in number)
        return pairs, tuple(string[len(PAIRS) + vertex - 1] for vertex in kept[1:-1])

    def from_scores(self, scores: Sequence[float], operations: Sequence[int]) -> tuple[int, ...] | None:
        """VAENAS's strategy: of 21 numbers the nine largest are edges; None when they leave no path."""
        order = sorted(range(len(PAIRS)), key=lambda index: -scores[index])
        chosen = set(order[:MAX_EDGES])
        string = (*(int(index in chosen) for index in range(len(PAIRS))), *operations)
        return string if self.is_valid(string) else None

    def random_string(self, rng: random.Random) -> tuple[int, ...]:
        """21 uniform numbers and five operations, drawn again until the cell is connected."""
        while True:
            operations = [rng.randrange(len(NASBENCH101_CANDIDATES)) for _ in range(VERTICES - 2)]
            string = self.from_scores([rng.random() for _ in PAIRS], operations)
            if string is not None:
                return string

    def mutate(self, string: Sequence[int], rate: float, rng: random.Random) -> tuple[int, ...]:
        """Exchange one edge for one that is not there, until the cell is connected; operations change with `rate`."""
        on = [index for index in range(len(PAIRS)) if string[index]]
        off = [index for index in range(len(PAIRS)) if not string[index]]
        while True:
            child = list(string)
            child[rng.choice(on)], child[rng.choice(off)] = 0, 1
            for place in range(len(PAIRS), len(child)):
                if rng.random() < rate:
                    child[place] = rng.randrange(len(NASBENCH101_CANDIDATES))
            if self.is_valid(child):
                return tuple(child)

    def cross(self, first: Sequence[int], second: Sequence[int], rng: random.Random) -> tuple[int, ...]:
        """Give the first cell an edge that only the second has, for one that only the first has; operations of either.

        A child without a path is dropped, and the first cell comes back after as many tries as there are edges.
        """
        operations = [rng.choice(pair) for pair in zip(first[len(PAIRS) :], second[len(PAIRS) :], strict=True)]
        on = [index for index in range(len(PAIRS)) if first[index] and not second[index]]
        off = [index for index in range(len(PAIRS)) if second[index] and not first[index]]
        for _ in range(len(PAIRS) if on and off else 0):
            child = list(first[: len(PAIRS)])
            child[rng.choice(on)], child[rng.choice(off)] = 0, 1
            if self.is_valid((*child, *operations)):
                return (*child, *operations)
        return (*first[: len(PAIRS)], *operations)

    def decode(self, string: Sequence[int], *, rule: str = "") -> ArchitectureString:
        """Raises UserError for a string that is no valid cell."""
        sizes = self.choices
        if len(string) != len(sizes) or any(not 0 <= n < size for n, size in zip(string, sizes, strict=True)):
            raise UserError("genotype: a cell of NAS-Bench-101 is 21 bits and five operations from 0 to 2")
        if not self.is_valid(string):
            raise UserError("genotype: a cell of NAS-Bench-101 has at most 9 edges and a path from input to output")
        pairs, operations = self.prune(string)
        names = ("input", *(NASBENCH101_CANDIDATES[index] for index in operations), "output")
        lines = tuple(
            f"vertex {v} = {names[v]} of {', '.join(str(s) for s, t in pairs if t == v)}" for v in range(1, len(names))
        )
        return ArchitectureString(self.name, tuple(string), lines, rule)

    def random_genotype(self, rng: random.Random) -> ArchitectureString:
        """As `random_string`."""
        return self.decode(self.random_string(rng), rule="random")


class Nasbench101Table:
    """Mean test accuracy after 108 epochs (per cent) and parameters of all cells, up to isomorphism."""

    def __init__(
        self, rows: dict[tuple[int, int, tuple[int, ...]], int], hits: np.ndarray, parameters: np.ndarray
    ) -> None:
        self.rows, self.hits, self.parameters = rows, hits, parameters

    @classmethod
    def read(cls, path: str | Path) -> Nasbench101Table:
        """From a numpy archive of num_vertices, adj_bits, ops, test_hits and params: docs/tables.md has the format.

        Nothing in the file is unpickled. Raises UserError when it is no such archive.
        """
        names = ("num_vertices", "adj_bits", "ops", "test_hits", "params")
        try:
            arrays, _ = read_arrays(path, names, limit=MAX_ROWS * 8 * (VERTICES - 2))
            vertices, bits, ops, hits, parameters = columns = [arrays[name] for name in names]
            if any(column.dtype.kind not in "iu" or len(column.shape) < 1 for column in columns):
                raise ValueError("its arrays must hold integers")
            rows = len(vertices)
            if rows > MAX_ROWS or any(c.shape != ((rows, VERTICES - 2) if c is ops else (rows,)) for c in columns):
                raise ValueError(f"its arrays must have one row a cell, at most {MAX_ROWS:,}")
        except OSError as error:
            raise UserError(f"cannot read the table {path}: {error.strerror or error}") from None
        except (KeyError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise UserError(f"{path} is no table of NAS-Bench-101 ({reason}): see docs/tables.md") from None
        keys = zip(vertices.tolist(), bits.tolist(), ops.tolist(), strict=True)
        found = {(v, edges, tuple(op[: max(v - 2, 0)])): row for row, (v, edges, op) in enumerate(keys)}
        return cls(found, hits, parameters)

    def find(self, cell: Cell) -> int | None:
        """Row of a pruned cell, whichever of its isomorphic forms the table holds."""
        pairs, operations = cell
        inner = len(operations)
        for order in permutations(range(1, inner + 1)):
            place = {0: 0, inner + 1: inner + 1, **{old: new for new, old in enumerate(order, start=1)}}
            moved = [(place[s], place[t]) for s, t in pairs]
            if all(s < t for s, t in moved):
                bits = sum(1 << (s + t * (t - 1) // 2) for s, t in moved)
                row = self.rows.get((inner + 2, bits, tuple(operations[old - 1] for old in order)))
                if row is not None:
                    return row
        return None

    def accuracy(self, string: Sequence[int]) -> float:
        """Mean test accuracy in per cent. Raises UserError for a cell that the table lacks."""
        row = self.row(string)
        if row is None:
            raise UserError("the table of NAS-Bench-101 lacks this cell: it is incomplete, or the cell is not valid")
        return row["test_accuracy"]

    def row(self, string: Sequence[int]) -> dict[str, float] | None:
        """test_accuracy (per cent) and parameters, or None."""
        found = self.find(Nasbench101Space().prune(string))
        if found is None:
            return None
        return {
            "test_accuracy": 100 * int(self.hits[found]) / TEST_IMAGES,
            "parameters": float(self.parameters[found]),
        }
