"""What each method finds in NAS-Bench-201 on real CIFAR-10 after one small budget: accuracies by the benchmark's table.

    python bench/nasbench201_searches.py --table nasbench201.csv.gz --data-dir DIR --out FILE darts spos random

All searches share COMMON and cost about the same CPU time, but `darts-long` ten times as much, and `darts-full`, which
has all images and the steps of the published searches, a hundred times. A row is a method with its seeds; rows of other
methods stay in the file. Searches that are in --runs already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import report
from fastnas import search
from fastnas.lookup import look_up
from fastnas.runs import RunFolder, versions

COMMON: dict[str, Any] = {
    "space": "nasbench201",
    "data": "cifar10",
    "image_size": 16,
    "train_fraction": 0.05,  # 2,500 images for the weights, and as many others for the architecture
    "search_fraction": 0.05,
    "batch_size": 32,
    "channels": 8,
    "cells": 3,
    "lr": 0.025,
    "lr_min": 0.001,
    "threads": 1,
}
# About 15 s of CPU time each. Rates of architecture parameters are ten times the papers', for so few steps.
DARTS = {"method": "darts", "arch_lr": 3e-3}
GATES = {"epochs": 10, "arch_lr": 1e-2, "warmup_epochs": 1}
VAE = {"ranked": 50, "vae_interval": 2}
EVOLUTION = {"generations": 5, "population": 20, "crossovers": 10, "mutations": 10}
PATHS = EVOLUTION | {"epochs": 8, "recalibration_batches": 5, "score_batches": 10}
SETTINGS: dict[str, dict[str, Any]] = {
    "darts": DARTS | {"epochs": 3},
    "darts-long": DARTS | {"epochs": 40, "batch_size": 64},
    "darts-full": DARTS | {"epochs": 50, "batch_size": 64, "train_fraction": 0.5, "search_fraction": 0.5},
    "pc_darts": {"method": "pc_darts", "epochs": 6, "arch_lr": 6e-3, "warmup_epochs": 2, "partial": 4},
    "parsec": {"method": "parsec", "epochs": 5, "samples": 4},
    "snas": {"method": "snas", "epochs": 5, "arch_lr": 3e-3, "resource": "none"},
    "proxyless": GATES | {"method": "proxyless"},
    "vaenas_g": GATES | VAE | {"method": "vaenas_g"},
    "spos": PATHS | {"method": "spos"},
    "vaenas_os": PATHS | VAE | {"method": "vaenas_os", "epsilon_step": 1.5e-3, "vae_seeds": 20},
    "random": {"method": "random", "epochs": 15, "samples": 5},
}
COLUMNS = ("c10_test", "c100_test", "in16_test")


def run(name: str, seed: int, data_dir: Path, table: Path, runs: Path) -> dict[str, Any]:
    """The search of one method and seed, and the table's accuracies of what it found."""
    out = runs / f"{name}-{seed}"
    if not (out / "cpu_s.json").exists():
        flags = COMMON | SETTINGS[name] | {"data_dir": data_dir, "seed": seed}
        started = time.process_time()
        search.run_search(search.resolve(flags), out, quiet=True)
        (out / "cpu_s.json").write_text(json.dumps(round(time.process_time() - started, 1)))
    epochs = RunFolder.open(out).metrics()
    found = look_up(str(out), table)
    row = {"seed": seed, "genotype": epochs[-1]["genotype"], "cpu_s": json.loads((out / "cpu_s.json").read_text())}
    row |= {"search_accuracy": round(epochs[-1]["search_accuracy"], 4)} | {column: found[column] for column in COLUMNS}
    if "skips_normal" in epochs[-1]:
        row["skips"] = [int(epoch["skips_normal"]) for epoch in epochs]  # of six edges, epoch by epoch
    return row


def summary(rows: list[dict[str, Any]], column: str) -> dict[str, float]:
    values = [row[column] for row in rows]
    spread = {"std": round(statistics.pstdev(values), 2)} if len(values) > 1 else {}
    return {"mean": round(statistics.mean(values), 2)} | spread


def write(path: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Put the method's row into the report, in the order of SETTINGS."""
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    new = {"method": name} | {column: summary(rows, column) for column in (*COLUMNS, "cpu_s")}
    new |= {"settings": SETTINGS[name], "commit": versions().get("commit", ""), "seeds": rows}
    kept = [row for row in old if row["method"] != name] + [new]
    ordered = sorted(kept, key=lambda row: list(SETTINGS).index(row["method"]))
    command = "python bench/nasbench201_searches.py --table FILE --data-dir DIR --out FILE"
    head = report.header(*command.split(), *(row["method"] for row in ordered))
    report.write(path, head | {"common": COMMON}, ordered)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("methods", nargs="+", choices=tuple(SETTINGS), help="rows to make")
    parser.add_argument("--table", type=Path, required=True, help="table of NAS-Bench-201, see docs/tables.md")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of cifar-10-batches-py")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds [%(default)s]")
    parser.add_argument("--runs", type=Path, default=Path("runs/nasbench201"), help="folder of the runs [%(default)s]")
    parser.add_argument("--out", type=Path, required=True, help="JSON file with the results")
    arguments = parser.parse_args()
    for name in arguments.methods:
        rows = []
        for seed in range(arguments.seeds):
            rows.append(run(name, seed, arguments.data_dir, arguments.table, arguments.runs))
            print(f"{name} seed {seed}: {rows[-1]['c10_test']:.2f} in {rows[-1]['cpu_s']} s", flush=True)
        write(arguments.out, name, rows)


if __name__ == "__main__":
    main()
