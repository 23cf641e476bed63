"""`python -m fastnas.repeat --seeds N`: search with several seeds, say how far they agree and keep the best genotype.

Searches vary with their seed: DARTS and PARSEC choose among several by the accuracy on the search half.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastnas._files import replace_file
from fastnas.cli import ArgumentParser, check_positive, run_command
from fastnas.config import WHICH_DATA, as_flags
from fastnas.repeated_runs import deviation, seed_runs
from fastnas.report.cells import describe_cells, draw_cells
from fastnas.report.comparison import render_comparison
from fastnas.report.records import read_record
from fastnas.runs import default_run_path
from fastnas.search import Plan, SearchResult, add_search_flags, given_settings, resolve, run_search
from fastnas.spaces.agreement import edge_agreement


@dataclass(frozen=True)
class Repeated:
    """Searches that differ in their seed. `accuracies`: on the search half after the last epoch, by seed; `agreement`:
    by edge, see `fastnas.spaces.agreement.edge_agreement`."""

    best: SearchResult
    accuracies: Mapping[int, float]
    agreement: Mapping[str, float]

    @property
    def mean(self) -> float:
        """Mean of the accuracies."""
        return statistics.fmean(self.accuracies.values())

    @property
    def deviation(self) -> float:
        """Standard deviation of the accuracies, with n - 1; 0 for one seed."""
        return deviation(self.accuracies.values())

    @property
    def mean_agreement(self) -> float:
        """Mean over the edges that at least one genotype has."""
        return statistics.fmean(self.agreement.values())

    def to_json(self) -> str:
        """What seeds.json holds."""
        table = {
            "search_accuracy": {str(seed): accuracy for seed, accuracy in self.accuracies.items()},
            "mean": self.mean,
            "standard_deviation": self.deviation,
            "mean_agreement": self.mean_agreement,
            "agreement": dict(self.agreement),
        }
        return json.dumps(table, indent=2) + "\n"


def run_repeated(plan: Plan, seeds: int, out: Path, *, quiet: bool = False) -> Repeated:
    """Search with the plan's seed and the `seeds` - 1 after it, each in `out`/seed-S.

    `out` gets the best genotype and its drawing, so that it serves as the folder of a run, seeds.json, and report.html,
    which compares the runs. Called again it goes on where it was stopped. Raises UserError when `out` has runs of other
    settings.
    """
    results, accuracies = {}, {}
    for seed, one, folder, resume in seed_runs(plan, seeds, out, resolve, quiet=quiet):
        results[seed] = run_search(one, folder, resume=resume, quiet=quiet)
        accuracies[seed] = results[seed].run.metrics()[-1]["search_accuracy"]
    best = results[max(accuracies, key=lambda seed: accuracies[seed])]
    repeated = Repeated(best, accuracies, edge_agreement([result.genotype for result in results.values()]))
    replace_file(out / "genotype.json", [best.genotype.to_json().encode()])
    replace_file(out / "cells.svg", [draw_cells(best.genotype).encode()])
    replace_file(out / "seeds.json", [repeated.to_json().encode()])
    records = [read_record(result.run.path) for result in results.values()]
    replace_file(out / "report.html", [render_comparison(records).encode()])
    return repeated


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m fastnas.repeat",
        usage="%(prog)s [--seeds N] [settings of python -m fastnas.search]",
        description="Search with N seeds, one after the other, print mean and standard deviation of the accuracy on "
        "the search half and how far the genotypes agree, and keep the genotype with the best accuracy. The same "
        "command goes on where it was stopped.",
    )
    parser.add_argument("--seeds", type=int, default=2, metavar="N", help="searches to run [2, as in PARSEC]")
    parser.add_argument("--out", type=Path, help="folder of the runs [runs/<method>-<data>-<time>]")
    add_search_flags(parser)
    return parser


def main(argv: list[str]) -> int:
    arguments = build_parser().parse_args(argv)
    check_positive(arguments, "seeds")
    plan = resolve(given_settings(arguments))
    out = arguments.out or default_run_path(plan.search.method, plan.data.data)
    repeated = run_repeated(plan, arguments.seeds, out, quiet=arguments.quiet)
    print(describe_cells(repeated.best.genotype))
    for seed, accuracy in repeated.accuracies.items():
        print(f"seed {seed}  search accuracy {accuracy:.2%}")
    print(f"mean {repeated.mean:.2%}, standard deviation {repeated.deviation:.2%}")
    full = sum(share == 1 for share in repeated.agreement.values())
    print(
        f"genotypes: {repeated.mean_agreement:.0%} have the most frequent choice of an edge, on average; all agree on "
        f"{full} of {len(repeated.agreement)} edges"
    )
    data = as_flags(plan.as_mapping(), *WHICH_DATA)
    print(f"best    {repeated.best.run.path}\nreport  {out / 'report.html'}")
    print(f"next    python -m fastnas.retrain --genotype {shlex.quote(str(out))} {data}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
