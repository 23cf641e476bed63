"""`python -m fastnas.lookup --genotype RUN --table FILE`: what a benchmark's table says of a cell that a search
found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fastnas._files import replace_file
from fastnas.cli import ArgumentParser, run_command
from fastnas.errors import UserError
from fastnas.spaces import ArchitectureString, load_genotype
from fastnas.spaces.nasbench101 import Nasbench101Space, Nasbench101Table
from fastnas.spaces.nasbench201 import Nasbench201Space, read_nasbench201


def look_up(genotype: str, table: Path) -> dict[str, float]:
    """The table's numbers for a cell of NAS-Bench-201 or NAS-Bench-101.

    `genotype`: run folder or file. Raises UserError for a cell of another space, and for one that the table lacks.
    """
    found = load_genotype(genotype)
    if isinstance(found, ArchitectureString) and found.space == Nasbench201Space.name:
        row = read_nasbench201(table).get(Nasbench201Space().decode(found.string).notation())
    elif isinstance(found, ArchitectureString) and found.space == Nasbench101Space.name:
        row = Nasbench101Table.read(table).row(Nasbench101Space().decode(found.string).string)
    else:
        raise UserError(f"the table holds cells of a benchmark, and {genotype} is of the space {found.space}")
    if row is None:
        raise UserError(f"{table} has no row for {found.notation()}")
    return row


def main(argv: list[str]) -> int:
    parser = ArgumentParser(
        prog="python -m fastnas.lookup",
        usage="%(prog)s --genotype RUN --table FILE",
        description="Print what the table of NAS-Bench-201 or NAS-Bench-101 says of a cell that a search found. In a "
        "run folder it is kept as lookup.json. docs/tables.md has the formats.",
    )
    parser.add_argument("--genotype", required=True, help="run folder of a search, or a genotype file")
    parser.add_argument("--table", type=Path, required=True, help="table of the benchmark, see docs/tables.md")
    arguments = parser.parse_args(argv)
    row = look_up(arguments.genotype, arguments.table)
    for name, value in row.items():
        print(f"{name:<20} {value:g}")
    if Path(arguments.genotype).is_dir():
        replace_file(Path(arguments.genotype) / "lookup.json", [(json.dumps(row) + "\n").encode()])
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
