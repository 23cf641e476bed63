"""VAENAS's study on NAS-Bench-101 (its section 5.3, Table 4) without weight sharing: what sampling finds in a table.

    python bench/nasbench101_study.py --table nasbench101.npz --out bench/results/nasbench101_study.json

6,000 random cells are looked up, noise is added to their accuracy, the best 1,500 train the autoencoder. Then the best
true accuracy among 10, 50, 100 and 300 samples, and after an evolution whose first population are samples.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fastnas.methods.vae import ArchitectureVae, train_vae
from fastnas.runs import versions
from fastnas.spaces.nasbench101 import Nasbench101Space, Nasbench101Table
from fastnas.spaces.strings import String

COUNTS = (10, 50, 100, 300)
TRAINED_ON, KEPT = 6000, 0.25
GENERATIONS, POPULATION, PARENTS, CHILDREN = 20, 50, 10, 25  # of Single Path One-Shot
SPACE = Nasbench101Space()


def learnt_sampler(table: Nasbench101Table, noise: float, seed: int, iterations: int) -> Callable[[int], list[String]]:
    """Samples of an autoencoder that was trained on the best quarter of cells; invalid ones are drawn again."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    cells = [SPACE.random_string(rng) for _ in range(TRAINED_ON)]
    scored = [(cell, table.accuracy(cell) + rng.gauss(0, noise)) for cell in cells]
    vae = ArchitectureVae(SPACE.choices, hidden=64, latent=16, generator=generator)
    optimizer = torch.optim.Adam(vae.parameters(), 1e-3)
    train_vae(vae, optimizer, scored, top_share=KEPT, iterations=iterations, generator=generator)

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


def study(table: Nasbench101Table, noise: float | None, seed: int, iterations: int) -> dict[str, float]:
    """One seed: best accuracy by number of samples, after evolution, and the mean of 300. `noise` None: uniform."""
    rng = random.Random(1000 + seed)
    if noise is None:
        drawn = [SPACE.random_string(rng) for _ in range(max(COUNTS))]
        first = [SPACE.random_string(rng) for _ in range(POPULATION)]
    else:
        sample = learnt_sampler(table, noise, seed, iterations)
        drawn, first = sample(max(COUNTS)), sample(POPULATION)
    accuracies = [table.accuracy(cell) for cell in drawn]
    figures = {f"best_of_{count}": max(accuracies[:count]) for count in COUNTS}
    return figures | {"mean": statistics.mean(accuracies), "evolution": evolve(table, first, rng)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", type=Path, required=True, help="table of NAS-Bench-101, see docs/tables.md")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds [%(default)s]")
    parser.add_argument("--iterations", type=int, default=1200, help="training steps of the autoencoder [%(default)s]")
    parser.add_argument("--out", type=Path, required=True, help="JSON file with the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Nasbench101Table.read(arguments.table)
    rows = []
    for name, noise in (
        ("uniform", None),
        ("VAE, no noise", 0.0),
        ("VAE, noise 0.1 %", 0.1),
        ("VAE, noise 0.5 %", 0.5),
    ):
        started = time.process_time()
        runs = [study(table, noise, seed, arguments.iterations) for seed in range(arguments.seeds)]
        row: dict[str, object] = {"sampling": name, "seeds": arguments.seeds}
        for key in runs[0]:
            values = [run[key] for run in runs]
            row[key] = {"mean": round(statistics.mean(values), 3), "std": round(statistics.pstdev(values), 3)}
        rows.append(row | {"cpu_s": round(time.process_time() - started, 1)})
        print(json.dumps(rows[-1]), flush=True)
    report = {
        "machine": f"{platform.processor() or platform.machine()}, one thread",
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "command": "python bench/nasbench101_study.py --table FILE --out FILE",
    }
    head = "".join(f"{json.dumps(name)}: {json.dumps(value)},\n" for name, value in report.items())
    body = ",\n".join(json.dumps(row) for row in rows)
    arguments.out.write_text(f'{{{head}"rows": [\n{body}\n]}}\n')


if __name__ == "__main__":
    main()
