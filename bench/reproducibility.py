"""What repeats: small searches whose settings should not matter, against a first one.

    python -m bench.reproducibility --out bench/results/reproducibility.json --epochs 6 darts pc_darts

Each row says whether metrics.jsonl and genotype are those of the first run of its method, byte for byte, how far the
losses of the first and the last epoch are from it, and the processor time of the search alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.report import header, write
from fastnas.search import SearchResult, resolve, run_search
from fastnas.spaces.agreement import edge_agreement

VARIANTS: dict[str, dict[str, Any]] = {
    "first": {},
    "again": {},
    "--deterministic": {"deterministic": True},
    "--threads 2": {"threads": 2},
    "--threads 2, again": {"threads": 2},
    "--executor lean": {"executor": "lean"},
    "--executor plain": {"executor": "plain"},
}


def search(method: str, epochs: int, more: dict[str, Any], out: Path) -> tuple[SearchResult, float]:
    """A search on the digits with one thread, and its processor seconds."""
    torch.use_deterministic_algorithms(False)
    started = time.process_time()
    plan = resolve({"method": method, "epochs": epochs, "threads": 1, "device": "cpu", **more})
    return run_search(plan, out, quiet=True), time.process_time() - started


def row(method: str, variant: str, found: SearchResult, seconds: float, first: SearchResult) -> dict[str, Any]:
    """The comparison of a run with the first one."""
    ours, theirs = found.run.metrics(), first.run.metrics()
    agreement = edge_agreement([found.genotype, first.genotype])
    return {
        "method": method,
        "variant": variant,
        "same_bytes": found.run.metrics_path.read_bytes() == first.run.metrics_path.read_bytes(),
        "edges_that_agree": sum(share == 1 for share in agreement.values()) / len(agreement),
        "first_loss_difference": abs(ours[0]["loss"] / theirs[0]["loss"] - 1),
        "last_loss_difference": abs(ours[-1]["loss"] / theirs[-1]["loss"] - 1),
        "cpu_s": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=6)
    arguments = parser.parse_args()
    head = header("python", "-m", "bench.reproducibility", *sys.argv[1:])
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for method in arguments.methods:
            runs: list[SearchResult] = []
            for variant, more in VARIANTS.items():
                result, seconds = search(method, arguments.epochs, more, Path(folder) / f"{method}-{len(runs)}")
                runs.append(result)
                rows.append(row(method, variant, result, seconds, runs[0]))
                print(rows[-1], flush=True)
                write(arguments.out, head, rows)


if __name__ == "__main__":
    main()
