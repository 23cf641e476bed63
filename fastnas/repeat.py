"""`python -m fastnas.repeat --seeds N`: search with several seeds and keep the best genotype.

Searches vary with their seed: DARTS and PARSEC choose among several by the accuracy on the search half.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from fastnas._files import replace_file
from fastnas.cli import ArgumentParser, run_command
from fastnas.config import add_flags, given
from fastnas.errors import UserError
from fastnas.methods import METHODS, WeightSettings
from fastnas.report.cells import describe_cells, draw_cells
from fastnas.runs import RunFolder, default_run_path
from fastnas.search import Plan, SearchResult, SearchSettings, resolve, run_search
from fastnas.settings import DataSettings, RuntimeSettings


def run_repeated(plan: Plan, seeds: int, out: Path, *, quiet: bool = False) -> tuple[SearchResult, dict[int, float]]:
    """Search with the plan's seed and the `seeds` - 1 after it, each in `out`/seed-S; give the best and all accuracies.

    `out` gets the best genotype and its drawing, so that it serves as the folder of a run. Called again it goes on
    where it was stopped. Raises UserError when `out` has runs of other settings.
    """
    results, accuracies = {}, {}
    for seed in range(plan.runtime.seed, plan.runtime.seed + seeds):
        one = replace(plan, runtime=replace(plan.runtime, seed=seed))
        folder = out / f"seed-{seed}"
        started = (folder / "checkpoint.pt").exists()
        if started and resolve({}, RunFolder.open(folder).config()) != one:
            raise UserError(f"{folder} holds a run of other settings: give another --out")
        if not quiet:
            print(f"seed {seed}")
        results[seed] = run_search(one, folder, resume=folder if started else None, quiet=quiet)
        accuracies[seed] = results[seed].run.metrics()[-1]["search_accuracy"]
    best = results[max(accuracies, key=lambda seed: accuracies[seed])]
    replace_file(out / "genotype.json", [best.genotype.to_json().encode()])
    replace_file(out / "cells.svg", [draw_cells(best.genotype).encode()])
    return best, accuracies


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m fastnas.repeat",
        usage="%(prog)s [--seeds N] [settings of python -m fastnas.search]",
        description="Search with N seeds, one after the other, and keep the genotype with the best accuracy on the "
        "search half. The same command goes on where it was stopped.",
    )
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="searches to run [2, as in PARSEC]")
    parser.add_argument("--preset", help="settings of a paper or a data set, by name, or the path of a .toml file")
    parser.add_argument("--out", type=Path, help="folder of the runs [runs/<method>-<data>-<time>]")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the result")
    add_flags(parser, SearchSettings, DataSettings, WeightSettings, RuntimeSettings)
    methods = [method.Settings for method in METHODS.values()]
    add_flags(parser.add_argument_group("settings of the methods"), *methods)
    return parser


def main(argv: list[str]) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.seeds < 1:
        raise UserError(f"seeds must be at least 1, got {arguments.seeds}")
    methods = [method.Settings for method in METHODS.values()]
    flags = given(arguments, SearchSettings, DataSettings, WeightSettings, RuntimeSettings, *methods)
    plan = resolve(flags | ({"preset": arguments.preset} if arguments.preset else {}))
    out = arguments.out or default_run_path(plan.search.method, plan.data.data)
    best, accuracies = run_repeated(plan, arguments.seeds, out, quiet=arguments.quiet)
    print(describe_cells(best.genotype))
    for seed, accuracy in accuracies.items():
        print(f"seed {seed}  search accuracy {accuracy:.2%}")
    print(f"best  {best.run.path}\nnext  python -m fastnas.retrain --genotype {out} --data {plan.data.data}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
