"""A soak: hundreds of search steps, after which the process holds as much memory as after the first fifty.

    python bench/soak.py --steps 500 --out bench/results/soak.json

Each row is a method on random images: resident bytes of the process, and bytes and number of live tensors, after step
50 and at the end. `drift` fits a line to the resident size between the two.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.report import header, write
from fastnas.engine.training import settled_heap
from fastnas.methods import Method
from fastnas.search import build_method, resolve

SETTLED = 50  # steps after which every buffer has been made
METHODS = ("darts", "pc_darts", "parsec", "snas")


def resident() -> int:
    """Bytes of main memory that the process has."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def live_tensors() -> tuple[int, int]:
    """Number and bytes of the tensors made since `settled_heap`; a storage that several share counts once."""
    gc.collect()
    storages = {}
    count = 0
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            count += 1
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return count, sum(storages.values())


def build(name: str, batch_size: int, channels: int, cells: int) -> Method:
    size = {"batch_size": batch_size, "channels": channels, "cells": cells, "nodes": 2, "epochs": 1000}
    plan = resolve({"method": name, "preset": f"{name}-digits", **size})
    method = build_method(plan, 10, 1, torch.device("cpu"), 8)
    method.start_epoch(999)
    return method


def soak(
    name: str, steps: int, *, settled_after: int = SETTLED, batch_size: int = 16, channels: int = 8, cells: int = 3
) -> dict[str, Any]:
    """Memory of `steps` search steps of a method, after `settled_after` of them and at the end."""
    torch.manual_seed(0)
    method = build(name, batch_size, channels, cells)
    sizes = []
    started = time.process_time()
    with settled_heap():
        for step in range(steps):
            x, y = torch.randn(2, batch_size, 1, 8, 8), torch.randint(10, (2, batch_size))
            method.step(step, (x[0], y[0]), (x[1], y[1]))
            sizes.append(resident())
            if step + 1 == settled_after:
                settled = live_tensors()
        last = live_tensors()
    later = torch.tensor(sizes[settled_after:], dtype=torch.float64)
    places = torch.arange(len(later), dtype=torch.float64) - (len(later) - 1) / 2
    return {
        **{"method": name, "steps": steps, "cpu_s": round(time.process_time() - started, 1)},
        **{
            "resident_settled": sizes[settled_after - 1],
            "resident_end": sizes[-1],
            "resident_most": max(sizes[settled_after:]),
        },
        "drift_bytes_a_step": round(float((places * later).sum() / (places * places).sum()), 1),
        **{"tensors_settled": settled[0], "tensors_end": last[0]},
        **{"tensor_bytes_settled": settled[1], "tensor_bytes_end": last[1]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in arguments.methods.split(","):
        rows.append(soak(name, arguments.steps))
        print(rows[-1], flush=True)
    if arguments.out:
        write(arguments.out, header("python", *sys.argv) | {"settled_after_steps": SETTLED}, rows)


if __name__ == "__main__":
    main()
