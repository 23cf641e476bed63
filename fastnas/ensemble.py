"""`python -m fastnas.ensemble RUN`: an ensemble of architectures that a PARSEC search's distribution gives.

Architectures are drawn from p(alpha | pi), each is trained from scratch, and their class probabilities are averaged:
what the paper names as future work (Casale et al. 2019, section 3.4).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastnas._files import replace_file
from fastnas.cli import ArgumentParser, check_positive, run_command
from fastnas.engine.training import evaluate
from fastnas.errors import UserError
from fastnas.methods.parsec import SlotDistribution
from fastnas.retrain import add_retraining_flags, given_settings, resolve, run_retrain
from fastnas.runs import RunFolder, default_run_path
from fastnas.settings import DataSettings, load_data, prepare
from fastnas.spaces import build_space
from fastnas.trained import load_network


@dataclass(frozen=True)
class EnsembleResult:
    """Test accuracies of the ensemble and of each of its members."""

    accuracy: float
    members: list[float]
    path: Path


def run_ensemble(
    run: Path, members: int, flags: Mapping[str, Any], out: Path, *, quiet: bool = False
) -> EnsembleResult:
    """Draw `members` architectures from the distribution of the search in `run`, retrain each, average them.

    `flags`: settings of retraining. Member i is in `out`/member-i and has the seed of the flags plus i; called again it
    goes on where it was stopped. Raises UserError when `run` is no PARSEC search.
    """
    config = RunFolder.open(run).config()
    if config.get("method") != "parsec":
        raise UserError(f"{run} is no PARSEC search, so it has no distribution to draw architectures from")
    distribution = SlotDistribution(build_space(config["space"], nodes=config["nodes"], cells=config["cells"]))
    distribution.load_run(run)
    seed = int(flags.get("seed", 0))
    choices = distribution.sample(members, torch.Generator().manual_seed(seed))
    plans, accuracies = [], []
    for member in range(members):
        folder = out / f"member-{member}"
        genotype = out / f"member-{member}.json"
        out.mkdir(parents=True, exist_ok=True)
        replace_file(genotype, [distribution.genotype(choices, member).to_json().encode()])
        plan = resolve({**flags, "genotype": str(genotype), "seed": seed + member})
        resume = folder if (folder / "checkpoint.pt").exists() else None
        accuracies.append(run_retrain(plan, folder, resume=resume, quiet=quiet).test_accuracy)
        plans.append((plan, folder))

    device = prepare(plans[0][0].runtime)
    data = load_data(plans[0][0].data, plans[0][0].runtime, device)
    networks = [load_network(folder).to(device) for _, folder in plans]

    def predict(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([network(x).softmax(-1) for network in networks]).mean(0).log()

    accuracy = evaluate(predict, data.test.batches(plans[0][0].retrain.batch_size))["accuracy"]
    result = {"test_accuracy": accuracy, "members": accuracies}
    replace_file(out / "ensemble.json", [(json.dumps(result) + "\n").encode()])
    return EnsembleResult(accuracy, accuracies, out)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m fastnas.ensemble",
        usage="%(prog)s RUN [--members N] [settings of python -m fastnas.retrain]",
        description="Draw architectures from the distribution of a PARSEC search, train each from scratch and average "
        "their predictions on the test set. The same command goes on where it was stopped.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a PARSEC search")
    parser.add_argument("--members", type=int, default=5, metavar="N", help="networks of the ensemble [5]")
    parser.add_argument("--out", type=Path, help="folder to make [runs/ensemble-<data>-<time>]")
    add_retraining_flags(parser)
    return parser


def main(argv: list[str]) -> int:
    arguments = build_parser().parse_args(argv)
    check_positive(arguments, "members")
    flags = given_settings(arguments)
    out = arguments.out or default_run_path("ensemble", str(flags.get("data", DataSettings.data)))
    result = run_ensemble(arguments.run, arguments.members, flags, out, quiet=arguments.quiet)
    for member, accuracy in enumerate(result.members):
        print(f"member {member}  test accuracy {accuracy:.2%}")
    print(f"ensemble  test accuracy {result.accuracy:.2%}\nfolder    {result.path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
