"""`python -m fastnas.retrain_seeds --seeds N --genotype RUN`: retrain with several seeds; mean and standard deviation.

Accuracies on CIFAR-10 vary with the seed of the weights, so papers report both; PARSEC over 5 seeds.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from fastnas._files import replace_file
from fastnas.cli import ArgumentParser, check_positive, run_command
from fastnas.repeated_runs import deviation, seed_runs
from fastnas.retrain import Plan, add_retraining_flags, given_settings, resolve, run_retrain
from fastnas.runs import default_run_path


@dataclass(frozen=True)
class SeedsResult:
    """Test accuracies by seed; `deviation` is that of a sample, over n - 1, and 0 for one seed."""

    accuracies: dict[int, float]
    path: Path

    @property
    def mean(self) -> float:
        return statistics.mean(self.accuracies.values())

    @property
    def deviation(self) -> float:
        return deviation(self.accuracies.values())


def run_seeds(plan: Plan, seeds: int, out: Path, *, quiet: bool = False) -> SeedsResult:
    """Retrain with the plan's seed and the `seeds` - 1 after it, each in `out`/seed-S; result.json has the summary.

    Called again it goes on where it was stopped. Raises UserError when `out` has runs of other settings.
    """
    accuracies = {}
    for seed, one, folder, resume in seed_runs(plan, seeds, out, resolve, quiet=quiet):
        accuracies[seed] = run_retrain(one, folder, resume=resume, quiet=quiet).test_accuracy
    result = SeedsResult(accuracies, out)
    summary = {"test_accuracies": accuracies, "mean": result.mean, "standard_deviation": result.deviation}
    replace_file(out / "result.json", [(json.dumps(summary) + "\n").encode()])
    return result


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m fastnas.retrain_seeds",
        usage="%(prog)s --genotype GENOTYPE [--seeds N] [settings of python -m fastnas.retrain]",
        description="Retrain a genotype with N seeds, one after the other, and report the mean and the standard "
        "deviation of the test accuracy. The same command goes on where it was stopped.",
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="trainings to run [3]")
    parser.add_argument("--out", type=Path, help="folder of the runs [runs/retrain-<data>-<time>]")
    add_retraining_flags(parser)
    return parser


def main(argv: list[str]) -> int:
    arguments = build_parser().parse_args(argv)
    check_positive(arguments, "seeds")
    plan = resolve(given_settings(arguments))
    out = arguments.out or default_run_path("retrain", plan.data.data)
    result = run_seeds(plan, arguments.seeds, out, quiet=arguments.quiet)
    for seed, accuracy in result.accuracies.items():
        print(f"seed {seed}  test accuracy {accuracy:.2%}")
    print(f"mean    {result.mean:.2%}, standard deviation {result.deviation:.2%}\nfolder  {out}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
