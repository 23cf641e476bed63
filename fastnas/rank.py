"""`python -m fastnas.rank RUN`: rank thousands of random architectures on one trained one-shot model.

Each line of the output holds an architecture, its accuracy on the search half with the shared weights, its divergence
from nearly complete architectures (`fastnas.methods.one_shot`) and its size. Several processes share the work: shard i
of n takes every n-th architecture, and under torchrun each process is a shard. The same command goes on where it was
stopped, also with another number of shards.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from fastnas import distributed, processes
from fastnas._files import replace_file
from fastnas.cli import ArgumentParser, check_positive, run_command
from fastnas.data import Data
from fastnas.engine.checkpoint import load_checkpoint
from fastnas.engine.choice_blocks import ChoiceBlockNetwork
from fastnas.engine.networks import build_network
from fastnas.engine.training import Batch
from fastnas.errors import UserError
from fastnas.methods.one_shot import OneShot, reference_log_probabilities, score, symmetric_divergence
from fastnas.progress import Progress
from fastnas.runs import RunFolder
from fastnas.search import Plan, build_method, resolve
from fastnas.settings import load_data, prepare
from fastnas.spaces.architecture import ArchitectureString

CHUNK = 16  # architectures between two writes
DIVERGENCE_IMAGES = 64  # random training images (section 5)
REFERENCES = 8


@dataclass(frozen=True)
class RankedRun:
    """A trained one-shot model with its data."""

    plan: Plan
    method: OneShot
    data: Data

    def size_of(self, genotype: ArchitectureString) -> int:
        """Parameters of the network of this architecture alone, in the size of the search."""
        with torch.device("meta"):
            weights = self.plan.weights
            network = build_network(
                genotype,
                channels=weights.channels,
                cells=weights.cells,
                classes=self.data.num_classes,
                in_channels=self.data.channels,
            )
        return sum(parameter.numel() for parameter in network.parameters())


def open_run(folder: Path, *, threads: int | None = None) -> RankedRun:
    """Load the last checkpoint of a One-Shot search. Raises UserError when `folder` holds none."""
    config = RunFolder.open(folder).config()
    if config.get("method") != OneShot.name:
        raise UserError(
            f"{folder} is no One-Shot search: give the run folder of python -m fastnas.search --method one_shot"
        )
    plan = resolve({} if threads is None else {"threads": threads}, config)
    device = prepare(plan.runtime)
    data = load_data(
        plan.data,
        plan.runtime,
        device,
        search_fraction=plan.search.search_fraction,
        train_fraction=plan.search.train_fraction,
    )
    method = build_method(plan, data.num_classes, data.channels, device, data.image_size)
    method.load_state_dict(load_checkpoint(RunFolder.open(folder).checkpoint_path, method=OneShot.name)["method"])
    method.supernet.eval()
    return RankedRun(plan, method, data)


def candidate(run: RankedRun, index: int, seed: int) -> ArchitectureString:
    """Architecture `index`, uniform over the space: a function of the seed and the index alone."""
    return run.method.space.random_genotype(random.Random(seed * 1_000_003 + index))


def rank(
    run: RankedRun, indices: Sequence[int], *, seed: int = 0, images: int | None = None, batch_size: int = 256
) -> Iterator[dict[str, Any]]:
    """A record for each architecture of `indices`, in order: index, string, accuracy, divergence, parameters.

    `images`: how many of the search half score each, None for all; they and the training images of the divergence are
    read once. Accuracies are on the statistics of ghost batches.
    """
    network = run.method.supernet
    batches: list[Batch] = list(run.data.search.batches(batch_size))
    chosen = torch.randperm(len(run.data.search), generator=torch.Generator().manual_seed(seed))[:images]
    x, y = (torch.cat(parts)[chosen] for parts in zip(*batches, strict=True))
    scored = list(zip(x.split(batch_size), y.split(batch_size), strict=True))
    x_train, _ = next(run.data.train.stream(min(DIVERGENCE_IMAGES, len(run.data.train)), seed=seed).from_step(0))
    references = reference_log_probabilities(network, x_train, REFERENCES, seed)
    for start in range(0, len(indices), CHUNK):
        chunk = indices[start : start + CHUNK]
        genotypes = [candidate(run, index, seed) for index in chunk]
        accuracies = score(network, genotypes, scored)
        divergences = _divergences(network, genotypes, x_train, references)
        for index, genotype, accuracy, divergence in zip(chunk, genotypes, accuracies, divergences, strict=True):
            yield {
                "index": index,
                "string": genotype.string,
                "accuracy": accuracy,
                "divergence": divergence,
                "parameters": run.size_of(genotype),
            }


@torch.inference_mode()
def _divergences(
    network: ChoiceBlockNetwork,
    genotypes: Sequence[ArchitectureString],
    x: torch.Tensor,
    references: Sequence[torch.Tensor],
) -> list[float]:
    """Mean symmetrised divergence of each architecture's predictions from those of the references, no labels used."""
    stem = network.stem(x)
    found = []
    for genotype in genotypes:
        log_q = network.after_stem(stem, genotype).log_softmax(-1)
        found.append(float(torch.stack([symmetric_divergence(log_p, log_q).mean() for log_p in references]).mean()))
    return found


def shard_path(folder: Path, shard: int, shards: int) -> Path:
    return folder / "rank" / f"shard-{shard}-of-{shards}.jsonl"


def read_ranking(folder: Path) -> list[dict[str, Any]]:
    """The records of all shards in `folder`/rank, best first. Raises UserError when there are none."""
    records: dict[int, dict[str, Any]] = {}
    for path in sorted((folder / "rank").glob("shard-*.jsonl")):
        records |= {record["index"]: record for record in _whole_lines(path)}
    if not records:
        raise UserError(f"{folder} has no ranking yet: run python -m fastnas.rank {folder}")
    return sorted(records.values(), key=lambda record: (-record["accuracy"], record["index"]))


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file; a last line that a kill tore apart is left out."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"\n")]


def run_rank(folder: Path, samples: int, shard: int, shards: int, *, quiet: bool = False, **settings: Any) -> Path:
    """Rank this shard's part of `samples` architectures; returns its file. `settings`: seed and images of `rank`,
    threads.

    The head of the file names the settings: a run that goes on with others raises UserError.
    """
    run = open_run(folder, threads=settings.pop("threads", None))
    path = shard_path(folder, shard, shards)
    path.parent.mkdir(exist_ok=True)
    text = json.dumps(settings, sort_keys=True) + "\n"
    for head in path.parent.glob("*.settings.json"):
        if head.read_text() != text:
            raise UserError(f"{head} says {head.read_text().strip()}: give the same settings, or remove {path.parent}")
    replace_file(path.with_suffix(".settings.json"), [text.encode()])
    path.write_text("".join(json.dumps(record) + "\n" for record in _whole_lines(path)))
    known = {record["index"] for shard in path.parent.glob("shard-*.jsonl") for record in _whole_lines(shard)}
    todo = [index for index in range(shard, samples, shards) if index not in known]
    with path.open("a", encoding="utf-8") as file, Progress(1, max(1, len(todo)), quiet=quiet) as progress:
        progress.start_epoch(0)
        for record in rank(run, todo, **settings):
            file.write(json.dumps(record) + "\n")
            file.flush()
            progress.step({})
    return path


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,4})/(\d{1,4})", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(f"shard must be I/N with I from 0 to N - 1, for example 0/2, got {text!r}")
    return int(match[1]), int(match[2])


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m fastnas.rank",
        usage="%(prog)s RUN [--samples N] [--shard I/N]",
        description="Draw architectures uniformly and rank them by their accuracy on a trained one-shot model. Results "
        "go to RUN/rank, one JSON line each; start one process a shard. The same command goes on where it was stopped.",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a One-Shot search")
    parser.add_argument("--samples", type=int, default=1000, metavar="N", help="architectures of all shards [1000]")
    parser.add_argument(
        "--shard", metavar="I/N", help="this process's part, counted from 0 [0/1; with torchrun the process's number]"
    )
    parser.add_argument("--images", type=int, metavar="N", help="images of the search half that score each [all]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the architectures [0]")
    parser.add_argument("--threads", type=int, help="CPU threads [those of the search]")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="how many of the best to print [5]")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the result")
    return parser


def main(argv: list[str]) -> int:
    arguments = build_parser().parse_args(argv)
    check_positive(arguments, "samples", "images", "threads")
    shard, shards = processes.rank(), processes.world_size()
    if arguments.shard is not None:
        if shards > 1:
            raise UserError("torchrun shares the architectures out by itself: leave out --shard")
        shard, shards = _shard(arguments.shard)
    with processes.alone():
        run_rank(
            arguments.run,
            arguments.samples,
            shard,
            shards,
            quiet=arguments.quiet,
            seed=arguments.seed,
            images=arguments.images,
            threads=arguments.threads,
        )
    distributed.wait_for_all()
    ranking = read_ranking(arguments.run)
    for record in islice(ranking, arguments.top):
        string = ",".join(map(str, record["string"]))
        print(f"{record['accuracy']:.2%}  {record['parameters']:>9,} parameters  {string}")
    print(f"{len(ranking)} architectures in {arguments.run / 'rank'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, several=True))
