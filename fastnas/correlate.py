"""`python -m fastnas.correlate RUN`: train ranked architectures alone and hold them against their ranks.

From the ranking of `python -m fastnas.rank` a stratified sample is trained from scratch, as are the best, the smallest
good and random architectures and the network with all paths on (Bender et al. 2018, sections 3.4 and 4.1, Figures 5 and
6, Table 1). Training is on the half of the data that trained the shared weights, accuracy on the search half.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fastnas._files import replace_file
from fastnas.cli import ArgumentParser, run_command
from fastnas.config import add_flags, given, merge, option
from fastnas.engine.networks import build_network
from fastnas.engine.training import cosine, evaluate, set_learning_rate
from fastnas.progress import Progress
from fastnas.rank import RankedRun, open_run, read_ranking
from fastnas.report.correlation import draw_correlation
from fastnas.spaces.architecture import ArchitectureString

Record = dict[str, Any]


@dataclass(frozen=True)
class CorrelateSettings:
    """The paper's, but for `buckets`, which it does not give."""

    buckets: int = option(
        10, "equal intervals of one-shot accuracy that the stratified sample is drawn from", minimum=1
    )
    per_bucket: int = option(4, "architectures of each interval", minimum=1)
    top: int = option(10, "architectures of the rows Top, Small and Random", minimum=1)
    small_quantile: float = option(
        0.9, "Small: the smallest of at least this quantile of accuracy", minimum=0, maximum=1
    )
    epochs: int = option(28, "epochs of stand-alone training", minimum=1)
    repeats: int = option(1, "trainings of each architecture, whose accuracies are averaged (paper: 5)", minimum=1)


def stratified(ranking: Sequence[Record], buckets: int, per_bucket: int, seed: int = 0) -> list[Record]:
    """Up to `per_bucket` records of each of `buckets` equal intervals between the least and the best accuracy."""
    accuracies = [record["accuracy"] for record in ranking]
    low, width = min(accuracies), (max(accuracies) - min(accuracies)) / buckets
    groups: list[list[Record]] = [[] for _ in range(buckets)]
    for record in ranking:
        place = int((record["accuracy"] - low) / width) if width else 0
        groups[min(buckets - 1, place)].append(record)
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for group in groups:
        chosen += [
            group[index] for index in sorted(torch.randperm(len(group), generator=generator)[:per_bucket].tolist())
        ]
    return chosen


def small_models(ranking: Sequence[Record], count: int, quantile: float) -> list[Record]:
    """The smallest architectures among those whose one-shot accuracy reaches the quantile (One-Shot Small)."""
    good = ranking[: max(1, math.ceil((1 - quantile) * len(ranking)))]
    return sorted(good, key=lambda record: record["parameters"])[:count]


def top_models(ranking: Sequence[Record], count: int, of: int = 100) -> list[Record]:
    """`count` evenly spaced places of the best `of` (One-Shot Top: a stratified sample of the top 100)."""
    best = ranking[:of]
    count = min(count, len(best))
    return [best[index * len(best) // count] for index in range(count)]


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rho: Pearson's correlation of the ranks, ties at their mean rank. NaN when one side is constant."""

    def ranks(values: Sequence[float]) -> torch.Tensor:
        v = torch.tensor(values, dtype=torch.double)
        below, equal = (v[:, None] > v).sum(1), (v[:, None] == v).sum(1)
        return below + (equal - 1) / 2

    return float(torch.corrcoef(torch.stack([ranks(x), ranks(y)]))[0, 1])


def train_alone(run: RankedRun, genotype: ArchitectureString, epochs: int, seed: int) -> float:
    """Accuracy on the search half of a network of this architecture, trained from scratch on the other half.

    SGD with Nesterov momentum, cosine from the search's learning rate to its end, the search's batch size.
    """
    weights = run.plan.weights
    torch.manual_seed(seed)
    network = build_network(
        genotype,
        channels=weights.channels,
        cells=weights.cells,
        classes=run.data.num_classes,
        in_channels=run.data.channels,
    ).to(run.method.problem.device)
    optimizer = torch.optim.SGD(
        network.parameters(), weights.lr, weights.momentum, weight_decay=weights.weight_decay, nesterov=True
    )
    stream = run.data.train.stream(weights.batch_size, seed=seed)
    batches = stream.from_step(0)
    network.train()
    for epoch in range(epochs):
        set_learning_rate(optimizer, cosine(epoch, epochs, weights.lr, weights.lr_min))
        for _ in range(len(stream)):
            x, y = next(batches)
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(network(x), y).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), weights.grad_clip)
            optimizer.step()
    network.eval()
    return evaluate(network, run.data.search.batches(256))["accuracy"]


def run_correlate(folder: Path, settings: CorrelateSettings, *, seed: int = 0, quiet: bool = False) -> dict[str, Any]:
    """Train the chosen architectures and write RUN/correlation.json and RUN/correlation.svg; returns the report.

    Each trained architecture is a line of RUN/standalone.jsonl: what is there already is not trained again.
    """
    run, ranking = open_run(folder), read_ranking(folder)
    sample = stratified(ranking, settings.buckets, settings.per_bucket, seed)
    by_chance = sorted(ranking, key=lambda record: record["index"])
    rows = {
        "One-Shot Top": top_models(ranking, settings.top),
        "One-Shot Small": small_models(ranking, settings.top, settings.small_quantile),
        "Random": by_chance[: settings.top],
        "All On": [_all_on(run)],
    }
    path = folder / "standalone.jsonl"
    trained = _read_trained(path, settings, seed)
    wanted = {tuple(record["string"]): record for group in (sample, *rows.values()) for record in group}
    todo = [string for string in wanted if string not in trained]
    with Progress(1, max(1, len(todo)), quiet=quiet) as progress, path.open("a", encoding="utf-8") as file:
        progress.start_epoch(0)
        for string in todo:
            genotype = run.method.space.decode(string)
            accuracies = [train_alone(run, genotype, settings.epochs, seed + n) for n in range(settings.repeats)]
            trained[string] = sum(accuracies) / len(accuracies)
            head = {"epochs": settings.epochs, "repeats": settings.repeats, "seed": seed}
            file.write(json.dumps({"string": string, "standalone": trained[string], **head}) + "\n")
            file.flush()
            progress.step({"standalone_accuracy": trained[string]})
    points = [record | {"standalone": trained[tuple(record["string"])]} for record in sample]
    report = {
        "settings": asdict(settings) | {"seed": seed},
        "ranked": len(ranking),
        "retrained": len(points),
        "spearman_accuracy_standalone": rank_correlation(
            [point["accuracy"] for point in points], [point["standalone"] for point in points]
        ),
        "spearman_divergence_accuracy": rank_correlation(
            [-record["divergence"] for record in ranking], [record["accuracy"] for record in ranking]
        ),
        "spearman_divergence_standalone": rank_correlation(
            [-point["divergence"] for point in points], [point["standalone"] for point in points]
        ),
        "rows": {name: _row(group, trained) for name, group in rows.items()},
        "points": points,
    }
    replace_file(folder / "correlation.json", [(json.dumps(report, indent=1) + "\n").encode()])
    replace_file(folder / "correlation.svg", [draw_correlation(ranking, points).encode()])
    return report


def _all_on(run: RankedRun) -> Record:
    genotype = run.method.space.all_on()
    return {"string": genotype.string, "parameters": run.size_of(genotype)}


def _row(group: Sequence[Record], trained: dict[tuple[int, ...], float]) -> dict[str, float]:
    """Mean and standard deviation of accuracy and parameters, as in the paper's Table 1."""
    figures = {}
    values = {
        "standalone": [trained[tuple(record["string"])] for record in group],
        "parameters": [record["parameters"] for record in group],
    }
    for name, numbers in values.items():
        spread = torch.tensor(numbers, dtype=torch.double)
        figures |= {f"{name}_mean": float(spread.mean()), f"{name}_std": float(spread.std(correction=0))}
    return figures | {"architectures": len(group)}


def _read_trained(path: Path, settings: CorrelateSettings, seed: int) -> dict[tuple[int, ...], float]:
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith(b"\n")]
    if len(whole) < len(lines):
        replace_file(path, whole)
    records = [json.loads(line) for line in whole]
    head = {"epochs": settings.epochs, "repeats": settings.repeats, "seed": seed}
    return {
        tuple(record["string"]): record["standalone"]
        for record in records
        if all(record[name] == value for name, value in head.items())
    }


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m fastnas.correlate",
        usage="%(prog)s RUN [--buckets N] [--per-bucket N] [--epochs N]",
        description="Train a stratified sample of ranked architectures from scratch, with the best, the smallest good "
        "and random ones and the network with all paths on. Writes RUN/correlation.json and RUN/correlation.svg. The "
        "same command goes on where it was stopped.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a One-Shot search with a ranking")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample and of training [0]")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the result")
    add_flags(parser, CorrelateSettings)
    return parser


def main(argv: list[str]) -> int:
    arguments = build_parser().parse_args(argv)
    (settings,) = merge((CorrelateSettings,), given(arguments, CorrelateSettings))
    report = run_correlate(arguments.run, settings, seed=arguments.seed, quiet=arguments.quiet)
    for name, row in report["rows"].items():
        print(
            f"{name:<15} {row['standalone_mean']:.2%} +- {row['standalone_std']:.2%}  {row['parameters_mean']:,.0f} "
            f"parameters"
        )
    print(f"rank correlation of one-shot and stand-alone accuracy: {report['spearman_accuracy_standalone']:.3f}")
    print(f"of (negative) divergence and one-shot accuracy:        {report['spearman_divergence_accuracy']:.3f}")
    print(f"{arguments.run / 'correlation.svg'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
