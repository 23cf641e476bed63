"""The cell space of NAS-Bench-201 as data (Dong and Yang 2020), and the table of its trained networks."""

from __future__ import annotations

import csv
import gzip
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fastnas.errors import UserError
from fastnas.spaces.architecture import ArchitectureString

MAX_BYTES = 32 * 2**20  # of the text; the published columns take 4 MiB
MAX_HEADER = 4096
NASBENCH201_CANDIDATES = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")


@dataclass(frozen=True)
class Nasbench201Space:
    """One cell of four states in which every earlier state feeds every later one: six edges, five candidates each.

    An architecture string has the candidate's index of each edge, in the order of the benchmark's text form
    `|op~0|+|op~0|op~1|+|op~0|op~1|op~2|`: 5^6 = 15,625 cells. State 0 is the input, state 3 the output.
    """

    name: ClassVar[str] = "nasbench201"
    candidates: ClassVar[tuple[str, ...]] = NASBENCH201_CANDIDATES
    nodes: ClassVar[int] = 3  # states that are computed
    num_edges: ClassVar[int] = 6
    num_reduction_edges: ClassVar[int] = 0  # no cell but the normal one is searched
    sources: ClassVar[tuple[int, ...]] = (0, 0, 1, 0, 1, 2)

    @property
    def choices(self) -> tuple[int, ...]:
        return (len(self.candidates),) * self.num_edges

    def edge_slice(self, node: int) -> slice:
        """The edges that end in state node + 1: (0,1), (1,3), (3,6)."""
        start = node * (node + 1) // 2
        return slice(start, start + node + 1)

    def decode(self, string: Sequence[int], *, rule: str = "") -> ArchitectureString:
        """Raises UserError for a string that is none of this space."""
        if len(string) != self.num_edges or any(not 0 <= number < len(self.candidates) for number in string):
            raise UserError(f"genotype: {list(string)} is no cell of NAS-Bench-201: six numbers from 0 to 4")
        return ArchitectureString(self.name, tuple(string), (self.text(string),), rule)

    def free_edges(self, normal: Sequence[int], reduce: Sequence[int] = (), *, rule: str = "") -> ArchitectureString:
        """As `decode`, under the name that spaces with a reduction cell have for it."""
        return self.decode(normal, rule=rule)

    def text(self, string: Sequence[int]) -> str:
        """The benchmark's text form."""
        pairs = [f"{self.candidates[i]}~{source}" for i, source in zip(string, self.sources, strict=True)]
        return "+".join(f"|{'|'.join(pairs[self.edge_slice(node)])}|" for node in range(self.nodes))

    def random_genotype(self, rng: random.Random) -> ArchitectureString:
        """Draw uniformly."""
        return self.decode([rng.randrange(size) for size in self.choices], rule="random")


def read_nasbench201(path: str | Path) -> dict[str, dict[str, float]]:
    """The rows of a table by the text form of their cells; columns are its numbers.

    The file is CSV, gzipped or not, with a header that names at least `arch`. Raises UserError for anything else.
    """
    try:
        with Path(path).open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            raw = (gzip.GzipFile(fileobj=file) if packed else file).read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES or raw[:MAX_HEADER].find(b"\n") < 0:
            raise ValueError(f"it has more than {MAX_BYTES:,} bytes, or no header line of at most {MAX_HEADER:,}")
        rows = list(csv.DictReader(raw.decode().splitlines()))
        if not rows or "arch" not in rows[0]:
            raise UserError(f"{path} has no column arch: give a CSV file of NAS-Bench-201, see docs/tables.md")
        return {row.pop("arch"): {name: float(value) for name, value in row.items()} for row in rows}
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read the table {path}: {error.strerror or error}") from None
    except (ValueError, TypeError, EOFError, csv.Error, zlib.error) as error:
        raise UserError(f"{path} is no table of NAS-Bench-201 ({error}): see docs/tables.md") from None
