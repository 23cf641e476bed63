"""Time of a retraining step at the CIFAR-10 preset: our network against the same one in PyTorch's modules.

    python bench/retrain_step.py --genotypes DARTS_V2,PC_DARTS_cifar --batch 24 --threads 1 --json FILE

A step is forward with auxiliary head and drop path, both losses, backward, clipping and SGD. Rounds run every row once,
in turn, so that a machine that slows down does so for all; the first runs are left out. Rows: `modules` is what users
have, NCHW in float32 with drop path in PyTorch's operations; `modules_channels_last` the same in the other layout;
`fused` our default on the CPU; `modules_bfloat16`, autocast; `compiled`, channels_last under torch.compile, whose first
run takes minutes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

import fastnas
from bench.report import header, save
from bench.timing import ratio
from fastnas.engine.derived import DerivedNetwork
from fastnas.engine.retraining import Arithmetic
from fastnas.engine.training import settled_heap
from fastnas.retrain import RetrainSettings
from fastnas.spaces import load_genotype

ROWS = {
    "modules": {"fused": False, "channels_last": False, "precision": "float32"},
    "modules_channels_last": {"fused": False, "channels_last": True, "precision": "float32"},
    "fused": {"fused": True, "channels_last": True, "precision": "float32"},
    "modules_bfloat16": {"fused": False, "channels_last": True, "precision": "bfloat16"},
    "compiled": {"fused": False, "channels_last": True, "precision": "float32"},
}
DEFAULT_ROWS = ("modules", "modules_channels_last", "fused")
OURS, THEIRS = "fused", "modules"
SETTINGS = RetrainSettings()  # the CIFAR-10 preset's


def build_step(row: str, genotype: str, batch: int, device: torch.device) -> Callable[[], None]:
    """A step of the row's network on random images of CIFAR-10's size."""
    arithmetic = Arithmetic.choose(device, **ROWS[row])
    torch.manual_seed(0)
    network = DerivedNetwork(
        load_genotype(genotype), channels=SETTINGS.channels, cells=SETTINGS.cells, classes=10, auxiliary=True
    )
    network = arithmetic.prepare(network).train()
    network.set_drop_path(SETTINGS.drop_path / 2)
    optimizer = torch.optim.SGD(
        network.parameters(), SETTINGS.lr, SETTINGS.momentum, weight_decay=SETTINGS.weight_decay
    )
    x, y = torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)
    x = arithmetic.images(x)
    forward = torch.compile(network.forward_with_auxiliary) if row == "compiled" else network.forward_with_auxiliary

    def step() -> None:
        with arithmetic.autocast():
            logits, auxiliary = forward(x)
        loss = F.cross_entropy(logits.float(), y)
        loss = loss + SETTINGS.auxiliary_weight * F.cross_entropy(auxiliary.float(), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), SETTINGS.grad_clip)
        optimizer.step()

    def without_our_ops() -> None:
        with fastnas.backend("reference"):
            step()

    return step if row == OURS else without_our_ops


def measure(rows: Sequence[str], genotype: str, batch: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Milliseconds of each row, and how many times longer than ours each takes, the median over the rounds.

    `cpu_ms` and `cpu_over_fused` are of the CPU time of all threads: with one thread the same on a quiet machine, and
    of use on a busy one.
    """
    steps = {row: build_step(row, genotype, batch, device) for row in rows}
    times: dict[str, list[float]] = {row: [] for row in rows}
    cpu_times: dict[str, list[float]] = {row: [] for row in rows}
    with settled_heap():
        for number in range(1 + rounds):
            for row, step in steps.items():
                start, cpu_start = time.perf_counter(), time.process_time()
                step()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times[row].append(1000 * (time.perf_counter() - start))
                cpu_times[row].append(1000 * (time.process_time() - cpu_start))
                if not number:
                    print(f"{genotype} {row}: first step {times[row][0] / 1000:.1f} s", file=sys.stderr)
    results: dict[str, Any] = {}
    for row, (first, *rest) in times.items():
        cpu = cpu_times[row][1:]
        results[row] = {"ms": statistics.median(rest), "ms_min": min(rest), "ms_max": max(rest), "first_ms": first}
        results[row]["cpu_ms"] = statistics.median(cpu)
        if OURS in times:
            results[row]["over_fused"] = ratio(rest, times[OURS][1:])
            results[row]["cpu_over_fused"] = ratio(cpu, cpu_times[OURS][1:])
    return results


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--genotypes", default="DARTS_V2,PC_DARTS_cifar", help="published names or files [%(default)s]")
    parser.add_argument("--rows", default=",".join(DEFAULT_ROWS), help=f"of {', '.join(ROWS)} [%(default)s]")
    parser.add_argument("--batch", type=int, default=24, help="images; up to 16 PyTorch's CPU takes slow paths [24]")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each row [7]")
    parser.add_argument("--threads", type=int, help="threads of PyTorch [its own choice]")
    parser.add_argument("--json", metavar="FILE", default="-", help="- is standard output [-]")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [row.strip() for row in given.rows.split(",")]
    report = {
        **header("python", "bench/retrain_step.py", *arguments),
        "threads": torch.get_num_threads(),
        "batch": given.batch,
        "rows": {name: measure(rows, name, given.batch, given.rounds, device) for name in given.genotypes.split(",")},
    }
    save(given.json, report)


if __name__ == "__main__":
    main(sys.argv[1:])
