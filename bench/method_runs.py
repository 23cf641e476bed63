"""One small search of each named setting, its last metrics, and the test accuracy of what it found.

    python bench/method_runs.py --out bench/results/digits_methods.json snas snas:resource=aggressive

A setting is METHOD or METHOD:KEY=VALUE,...; a method takes its digits preset. Rows of other settings stay in the file.
With `--data npz:FILE --smoke` each method runs two epochs with the rest of its digits preset, and nothing is retrained.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.report import header, write
from fastnas import retrain, search
from fastnas.runs import RunFolder, versions
from fastnas.spaces import load_genotype

SMOKE = {"epochs": 2, "batch_size": 32, "channels": 8, "cells": 3, "threads": 1}


def flags_of(setting: str) -> dict[str, Any]:
    """`snas:resource=mild,epochs=3` as flags of a search, read by the search's own parser."""
    method, _, rest = setting.partition(":")
    arguments = ["--method", method]
    for pair in rest.split(",") if rest else []:
        key, _, value = pair.partition("=")
        arguments += [f"--{key.replace('_', '-')}"] + ([value] if value else [])
    namespace = vars(search.build_parser().parse_args(arguments))
    return {key: value for key, value in namespace.items() if key not in ("out", "resume", "quiet", "debug", "preset")}


def run(setting: str, seed: int, data: str, smoke: bool, runs: Path) -> dict[str, Any]:
    """The row of one setting and seed."""
    flags = flags_of(setting) | {"data": data, "seed": seed}
    if smoke:
        flags = {"preset": f"{flags['method']}-digits"} | SMOKE | flags
    out = runs / f"{setting.replace(':', '-').replace('=', '-').replace(',', '-')}-{seed}-{data.partition(':')[0]}"
    started = time.process_time()
    if (out / "cells.svg").exists():
        result = search.SearchResult(load_genotype(out), RunFolder.open(out))
    else:
        result = search.run_search(search.resolve(flags), out, quiet=True)
    last = result.run.metrics()[-1]
    row = {"setting": setting, "seed": seed, "data": data.partition(":")[0], "epochs": last["epoch"] + 1}
    row |= {"commit": versions().get("commit", "")}
    row |= {"search_cpu_s": round(time.process_time() - started, 1), "rule": result.genotype.rule}
    left_out = ("epoch", "loss", "accuracy", "probabilities_normal", "probabilities_reduce")
    row |= {key: value for key, value in last.items() if key not in left_out}
    if not smoke:
        settings = {"genotype": str(result.run.genotype_path), "data": data, "seed": seed, "threads": 1}
        trained = retrain.run_retrain(retrain.resolve(settings), runs / f"{out.name}-retrained", quiet=True)
        row |= {"test_accuracy": trained.test_accuracy, "parameters": trained.parameters}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("settings", nargs="+", help="METHOD or METHOD:KEY=VALUE,...")
    parser.add_argument("--data", default="digits", help="data set [%(default)s]")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds [%(default)s]")
    parser.add_argument("--smoke", action="store_true", help="a small search that only shows that the method runs")
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"), help="folder of the runs [%(default)s]")
    parser.add_argument("--out", type=Path, required=True, help="JSON file with the results")
    arguments = parser.parse_args()
    for setting in arguments.settings:
        for seed in range(arguments.seeds):
            row = run(setting, seed, arguments.data, arguments.smoke, arguments.runs)
            report = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"rows": []}
            key = (row["setting"], row["seed"], row["data"])
            rows = [old for old in report["rows"] if (old["setting"], old["seed"], old["data"]) != key] + [row]
            settings = dict.fromkeys(old["setting"] for old in rows)
            smoke = ["--data", arguments.data, "--smoke"] if arguments.smoke else []
            write(arguments.out, header("python", "bench/method_runs.py", "--out", "FILE", *smoke, *settings), rows)
            print(f"{setting} seed {seed}: {row.get('search_accuracy', 0):.4f} searched", flush=True)


if __name__ == "__main__":
    main()
