"""VAENAS's study on NAS-Bench-101 (its section 5.3, Table 4): what sampling finds in a table.

    python bench/nasbench101_study.py --table nasbench101.npz --data-dir DIR --out bench/results/nasbench101_study.json

Without weight sharing 6,000 random cells are looked up, noise is added to their accuracy, the best 1,500 train the
autoencoder. With weight sharing a search on CIFAR-10 trains it (SEARCH). Then the best true accuracy among 10, 50, 100
and 300 samples, and after an evolution whose first population are samples. Rows that are not made again stay.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.report import header, write
from fastnas import search
from fastnas.engine.checkpoint import load_checkpoint
from fastnas.methods.vae import ArchitectureVae, train_vae
from fastnas.spaces import load_genotype
from fastnas.spaces.nasbench101 import Nasbench101Space, Nasbench101Table
from fastnas.spaces.strings import String

COUNTS = (10, 50, 100, 300)
TRAINED_ON, KEPT = 6000, 0.25
GENERATIONS, POPULATION, PARENTS, CHILDREN = 20, 50, 10, 25  # of Single Path One-Shot
SPACE = Nasbench101Space()
SEARCH: dict[str, Any] = {  # a small one: about 25 s of CPU time
    **{"method": "vaenas_os", "space": "nasbench101", "data": "cifar10", "image_size": 16, "threads": 1},
    **{"train_fraction": 0.05, "search_fraction": 0.05, "epochs": 12, "batch_size": 64, "channels": 16, "cells": 3},
    **{"lr": 0.025, "lr_min": 0.001, "epsilon_step": 2e-3, "ranked": 100, "rank_batches": 2, "vae_interval": 4},
    **{"vae_iterations": 200, "generations": 5, "population": 20, "crossovers": 10, "mutations": 10, "vae_seeds": 20},
    **{"recalibration_batches": 5, "score_batches": 10},
}
SHARED = "VAE, weight sharing"
NOISES = {"uniform": None, "VAE, no noise": 0.0, "VAE, noise 0.1 %": 0.1, "VAE, noise 0.5 %": 0.5}
Sample = Callable[[int], list[String]]


def learnt_sampler(table: Nasbench101Table, noise: float, seed: int, iterations: int) -> Sample:
    """Samples of an autoencoder that was trained on the best quarter of cells; invalid ones are drawn again."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    cells = [SPACE.random_string(rng) for _ in range(TRAINED_ON)]
    scored = [(cell, table.accuracy(cell) + rng.gauss(0, noise)) for cell in cells]
    vae = ArchitectureVae(SPACE.choices, hidden=64, latent=16, generator=generator)
    optimizer = torch.optim.Adam(vae.parameters(), 1e-3)
    train_vae(vae, optimizer, scored, top_share=KEPT, iterations=iterations, generator=generator)
    return valid_samples(vae, generator)


def shared_sampler(table: Nasbench101Table, run: Path, data_dir: Path, seed: int) -> tuple[Sample, dict[str, float]]:
    """The autoencoder that a search with shared weights has trained, and figures of the search.

    `found`: true accuracy of the cell that it ends with; `search_cpu_s`: its CPU time. What `run` has is not repeated.
    """
    plan = search.resolve(SEARCH | {"data_dir": data_dir, "seed": seed})
    if not (run / "cpu_s.json").exists():
        started = time.process_time()
        search.run_search(plan, run, quiet=True)
        (run / "cpu_s.json").write_text(json.dumps(round(time.process_time() - started, 1)))
    generator = torch.Generator().manual_seed(seed)
    vae = ArchitectureVae(
        SPACE.choices, hidden=plan.method.vae_hidden, latent=plan.method.vae_latent, generator=generator
    )
    vae.load_state_dict(load_checkpoint(run / "checkpoint.pt", method="vaenas_os")["method"]["sampler"]["vae"])
    figures = {
        "found": table.accuracy(load_genotype(run).string),
        "search_cpu_s": json.loads((run / "cpu_s.json").read_text()),
    }
    return valid_samples(vae, generator), figures


def valid_samples(vae: ArchitectureVae, generator: torch.Generator) -> Sample:
    """Draws from the autoencoder; what is no valid cell is drawn again."""

    def sample(count: int) -> list[String]:
        found: list[String] = []
        while len(found) < count:
            found += [string for string in vae.sample(count, generator) if SPACE.is_valid(string)]
        return found[:count]

    return sample


def evolve(table: Nasbench101Table, first: Sequence[String], rng: random.Random) -> float:
    """True accuracy of the best of GENERATIONS populations that are scored by it."""
    scores: dict[String, float] = {}
    population = list(first)
    for _ in range(GENERATIONS):
        scores |= {cell: table.accuracy(cell) for cell in population}
        parents = sorted(scores, key=lambda cell: -scores[cell])[:PARENTS]
        population = [SPACE.cross(rng.choice(parents), rng.choice(parents), rng) for _ in range(CHILDREN)]
        population += [SPACE.mutate(rng.choice(parents), 0.1, rng) for _ in range(CHILDREN)]
    return max(scores.values())


def study(table: Nasbench101Table, sample: Sample | None, seed: int) -> dict[str, float]:
    """One seed: best accuracy by number of samples, after evolution, and the mean of 300. `sample` None: uniform."""
    rng = random.Random(1000 + seed)
    if sample is None:

        def sample(count: int) -> list[String]:
            return [SPACE.random_string(rng) for _ in range(count)]

    drawn, first = sample(max(COUNTS)), sample(POPULATION)
    accuracies = [table.accuracy(cell) for cell in drawn]
    figures = {f"best_of_{count}": max(accuracies[:count]) for count in COUNTS}
    return figures | {"mean": statistics.mean(accuracies), "evolution": evolve(table, first, rng)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", type=Path, required=True, help="table of NAS-Bench-101, see docs/tables.md")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds [%(default)s]")
    parser.add_argument("--iterations", type=int, default=1200, help="training steps of the autoencoder [%(default)s]")
    parser.add_argument("--data-dir", type=Path, help="folder of cifar-10-batches-py; without it nothing is searched")
    parser.add_argument("--runs", type=Path, default=Path("runs/nasbench101"), help="folder of the runs [%(default)s]")
    parser.add_argument("--only", choices=(*NOISES, SHARED), help="the row to make; without it all are made")
    parser.add_argument("--out", type=Path, required=True, help="JSON file with the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Nasbench101Table.read(arguments.table)
    rows = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else []
    names = [*NOISES, SHARED] if arguments.data_dir else list(NOISES)
    for name in [arguments.only] if arguments.only else names:
        started = time.process_time()
        runs = []
        for seed in range(arguments.seeds):
            if name == SHARED:
                sample, figures = shared_sampler(table, arguments.runs / f"shared-{seed}", arguments.data_dir, seed)
                runs.append(study(table, sample, seed) | figures)
                continue
            noise = NOISES[name]
            sample = None if noise is None else learnt_sampler(table, noise, seed, arguments.iterations)
            runs.append(study(table, sample, seed))
        row: dict[str, object] = {
            "sampling": name,
            "seeds": arguments.seeds,
            "cpu_s": round(time.process_time() - started, 1),
        }
        for key in runs[0]:
            values = [run[key] for run in runs]
            row[key] = {"mean": round(statistics.mean(values), 3), "std": round(statistics.pstdev(values), 3)}
        rows = [old for old in rows if old["sampling"] != name] + [row]
        print(json.dumps(row), flush=True)
    command = "python bench/nasbench101_study.py --table FILE --data-dir DIR --out FILE"
    write(arguments.out, header(*command.split()) | {"search": SEARCH}, rows)


if __name__ == "__main__":
    main()
