"""Compare search methods by the retrained accuracy of what they find, against random genotypes at equal budget.

    python bench/compare_methods.py --out bench/results/digits_comparison.json

For each seed: each method searches with its preset, the derived network is retrained from scratch with the retraining
preset, and so are three random genotypes of the same space. All networks have the same size and the same epochs; the
test set is read once, after retraining. Finished runs are kept in --runs, so that an interrupted comparison goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

RANDOM_GENOTYPES = 3


def retrain(runs: Path, name: str, genotype: Path, seed: int, flags: dict[str, Any]) -> dict[str, Any]:
    """Retrain one genotype, or read the result of an earlier run of this comparison."""
    from fastnas.retrain import resolve, run_retrain

    size = "".join(f"-{key}-{flags[key]}" for key in ("epochs", "channels") if key in flags)
    out = runs / f"{name}-retrained{size}"
    if not (out / "result.json").exists():
        started = time.perf_counter()
        settings = {"genotype": str(genotype), "seed": seed, "threads": 1} | flags
        resume = out if (out / "checkpoint.pt").exists() else None
        run_retrain(resolve(settings), out, resume=resume, quiet=True)
        print(f"{name}: retrained in {time.perf_counter() - started:.0f} s", flush=True)
    return json.loads((out / "result.json").read_text())


def search_and_retrain(runs: Path, method: str, seed: int, data: str, flags: dict[str, Any]) -> dict[str, Any]:
    """One search with the method's preset, then retraining of what it derived."""
    from fastnas.search import resolve, run_search

    name = f"{method}-{seed}"
    out, done = runs / name, runs / name / "cells.svg"  # the drawing is written last
    if not done.exists():
        started = time.perf_counter()
        plan = resolve({"method": method, "data": data, "seed": seed, "threads": 1})
        run_search(plan, out, resume=out if (out / "checkpoint.pt").exists() else None, quiet=True)
        print(f"{name}: searched in {time.perf_counter() - started:.0f} s", flush=True)
    return {"method": method, "seed": seed} | retrain(runs, name, out / "genotype.json", seed, flags)


def random_genotype(runs: Path, index: int, seed: int, flags: dict[str, Any]) -> dict[str, Any]:
    """Retrain random genotype number `index` of a seed."""
    from fastnas.spaces import DartsSpace

    name = f"uniform-{seed}-{index}"
    path = runs / f"{name}.json"
    runs.mkdir(parents=True, exist_ok=True)
    path.write_text(DartsSpace().random_genotype(random.Random(1000 * seed + index)).to_json())
    return {"method": "random genotype", "seed": seed} | retrain(runs, name, path, seed, flags)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", default="darts,pc_darts,parsec", help="comma-separated [%(default)s]")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds [%(default)s]")
    parser.add_argument("--data", default="digits", help="data set [%(default)s]")
    parser.add_argument("--retrain-epochs", type=int, help="epochs of retraining [the preset's]")
    parser.add_argument("--retrain-channels", type=int, help="channels of retrained networks [the preset's]")
    parser.add_argument("--processes", type=int, default=2, help="runs side by side, one thread each [%(default)s]")
    parser.add_argument("--runs", type=Path, default=Path("runs/comparison"), help="folder of the runs [%(default)s]")
    parser.add_argument("--out", type=Path, required=True, help="JSON file with the results")
    arguments = parser.parse_args()
    size = {"epochs": arguments.retrain_epochs, "channels": arguments.retrain_channels}
    flags = {"data": arguments.data} | {key: value for key, value in size.items() if value is not None}

    with ProcessPoolExecutor(arguments.processes) as pool:
        jobs = []
        for seed in range(arguments.seeds):
            jobs += [pool.submit(random_genotype, arguments.runs, i, seed, flags) for i in range(RANDOM_GENOTYPES)]
            for method in arguments.methods.split(","):
                jobs.append(pool.submit(search_and_retrain, arguments.runs, method, seed, arguments.data, flags))
        rows = [job.result() for job in jobs]

    from bench.report import header, write

    write(arguments.out, header("python", *sys.argv) | {"retraining": flags}, rows)
    for method in dict.fromkeys(row["method"] for row in rows):
        chosen = [row["test_accuracy"] for row in rows if row["method"] == method]
        spread = statistics.stdev(chosen) if len(chosen) > 1 else 0.0
        print(f"{method:<18}{statistics.mean(chosen):.2%} +- {spread:.2%}  (n={len(chosen)})")


if __name__ == "__main__":
    main()
