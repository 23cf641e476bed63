"""Memory of the search methods, predicted at full scale and checked by measurement at a small one.

    python -m bench.footprints --out bench/results/footprints.json

Predictions need no memory to speak of; the measurements run on the CPU and take some minutes. Peaks of resident memory
include what no allocator of PyTorch sees, such as scratch space inside oneDNN.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastnas
from bench.report import header, write
from fastnas import profile
from fastnas.engine.mixture import Alphas
from fastnas.engine.supernet import EXECUTORS, Supernet
from fastnas.engine.training import Batch
from fastnas.methods import METHODS
from fastnas.profiler.step import Inputs, predict
from fastnas.spaces import DartsSpace, Genotype, load_genotype

CIFAR, IMAGENET = (3, 32, 32), (3, 224, 224)
CHILDREN = 24  # random genotypes whose mean is a child
SMALL = {"batch_size": 8}  # of the measurements: the papers' networks on few images
# Tempered weights let every child of PARSEC run, as a prediction supposes; ghost batches must fit the batch.
MEASURED_WITH: dict[str, dict[str, Any]] = {
    "parsec": {"likelihood": "mean", "samples": 4},
    "one_shot": {"ghost_batch": 8},
}


class Pass:
    """One forward and backward pass of the supernet, as `fastnas.profiler.step.Trains`.

    With alphas that need a gradient and weights that do, it is what DARTS's released code does in each of its steps.
    """

    def __init__(
        self,
        *,
        k: int = 1,
        genotype: Genotype | None = None,
        weights: bool = True,
        alphas: bool = True,
        executor: str = "plain",
    ) -> None:
        space = DartsSpace()
        supernet = Supernet(space, channels=16, cells=8, classes=10, k=k, executor=executor)
        self.supernet = supernet.requires_grad_(weights)
        self.alphas = Alphas(space, edge_normalisation=k > 1).requires_grad_(alphas)
        self.genotype = genotype

    def step(self, index: int, train: Batch, search: Batch) -> None:
        logits: Tensor = self.supernet(train[0], self.genotype or self.alphas())
        nn.functional.cross_entropy(logits, train[1]).backward()


def passes() -> Iterator[dict[str, Any]]:
    """Saved bytes of single passes: on plain PyTorch, on the ops of this library, and on the fused executors."""
    cases: list[tuple[str, int, dict[str, Any]]] = [
        ("DARTS", 64, {}),
        ("DARTS, weights alone", 64, {"alphas": False}),
        ("DARTS, alphas alone", 64, {"weights": False}),
        *((f"PC-DARTS, K={k}", 64, {"k": k}) for k in (2, 4, 8)),
        ("PC-DARTS, K=4", 256, {"k": 4}),
        ("child DARTS_V2", 64, {"genotype": load_genotype("DARTS_V2")}),
    ]
    for name, batch_size, options in cases:
        row: dict[str, Any] = {"pass": name, "batch_size": batch_size}
        for key, backend, executor in (
            ("plain_saved", "reference", "plain"),
            ("saved", "native", "plain"),
            ("fused_saved", "native", "fused"),
            ("lean_saved", "native", "lean"),
        ):
            with fastnas.backend(backend):
                footprint = predict(Pass(**options, executor=executor), Inputs(CIFAR, batch_size), name=name)
            row[key] = footprint.saved_bytes
        yield row
    rng = random.Random(0)
    genotypes = [DartsSpace().random_genotype(rng) for _ in range(CHILDREN)]
    for executor in ("plain", "fused"):
        sizes = [
            predict(Pass(genotype=g, executor=executor), Inputs(CIFAR, 64), name="child").saved_bytes for g in genotypes
        ]
        yield {
            "pass": f"{CHILDREN} random children",
            "executor": executor,
            "batch_size": 64,
            "saved": round(sum(sizes) / len(sizes)),
            "smallest": min(sizes),
            "largest": max(sizes),
        }


def steps() -> Iterator[dict[str, Any]]:
    """Peaks of whole search steps, by method, executor and setting."""
    yield step("pc_darts", {})
    for executor in EXECUTORS:
        for method in METHODS:
            yield step(method, {"batch_size": 64, "executor": executor})
        yield step("darts", {"batch_size": 64, "executor": executor, "order": 2})
    for k in (1, 2, 8):  # beside 4
        yield step("pc_darts", {"batch_size": 64, "executor": "plain", "partial": k})
        yield step("pc_darts", {"batch_size": 64, "executor": "fused", "partial": k})
    for samples in (1, 4, 64):  # beside 16
        yield step("parsec", {"batch_size": 64, "samples": samples})
    for method in ("darts", "pc_darts"):
        yield step(method, {"batch_size": 1024}, IMAGENET, classes=1000)


def step(
    method: str, flags: dict[str, Any], image: tuple[int, int, int] = CIFAR, *, classes: int = 10
) -> dict[str, Any]:
    (subject,) = profile.method_steps(flags, methods=[method], image=image, classes=classes)
    started = time.process_time()
    footprint = subject.predict()
    return {
        "step": method,
        "settings": flags,
        "image": image,
        "batch_size": footprint.batch_size,
        "peak": footprint.peak,
        "at_peak": footprint.at_peak,
        "peak_phase": footprint.peak_phase,
        "saved": [[entry.phase, entry.bytes] for entry in footprint.saved],
        "flops": footprint.flops,
        "parameters": footprint.parameters,
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def measurements() -> Iterator[dict[str, Any]]:
    """Prediction against the tracker, the allocator and resident memory, each in a process of its own."""
    main = ("darts", "pc_darts", "parsec")
    cases: list[tuple[str, dict[str, Any]]] = [(method, {"executor": "fused"}) for method in METHODS]
    cases += [(method, {"executor": executor}) for method in main for executor in ("plain", "lean")]
    cases.append(("darts", {"executor": "fused", "order": 2}))
    for method, flags in cases:
        flags = SMALL | flags | MEASURED_WITH.get(method, {})
        row = {"measured": method, "settings": flags} | _elsewhere("measure", method, flags)
        if method in main:
            row |= _elsewhere("resident", method, flags)
        yield row


def measure(method: str, flags: dict[str, Any]) -> dict[str, Any]:
    (subject,) = profile.method_steps(flags, methods=[method], image=CIFAR)
    predicted, measured = subject.predict(), subject.measure()
    return {
        "predicted_peak": predicted.peak,
        "tracked_peak": measured.peak,
        "allocator_peak": measured.allocator_peak,
        "saved_equal": predicted.saved == measured.saved,
        "saved_bytes": measured.saved_bytes,
        "step_seconds": round(measured.seconds or 0, 2),
    }


def resident(method: str, flags: dict[str, Any]) -> dict[str, Any]:
    """Resident memory at its peak over the first two steps, in a process that did nothing before: tensors that exist
    at the start plus the growth. It includes the code and scratch space of oneDNN, and gaps between blocks."""
    (subject,) = profile.method_steps(flags, methods=[method], image=CIFAR)
    running, batch_size = subject.build(torch.device("cpu")), subject.inputs.batch_size
    batches = [(torch.randn(batch_size, *CIFAR), torch.zeros(batch_size).long()) for _ in "ab"]
    modules = [part for part in vars(running).values() if isinstance(part, nn.Module)]
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    held = sum(tensor.nbytes for tensor in (*tensors, *batches[0], *batches[1]))
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    running.step(0, *batches)
    running.step(0, *batches)
    return {"resident_peak": held + status("VmHWM") - before}


def status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def fits() -> Iterator[dict[str, Any]]:
    """The batch that a prediction finds for a limit, run; and 1.1 times that batch, run."""
    for method in ("darts", "pc_darts", "parsec"):
        flags = {"likelihood": "mean", "samples": 2} if method == "parsec" else {}
        yield {"fit": method, "settings": flags} | _elsewhere("fit", method, flags)


def fit(method: str, flags: dict[str, Any], limit: int = 2**28) -> dict[str, Any]:
    (subject,) = profile.method_steps(flags, methods=[method], image=CIFAR)
    batch = subject.largest_batch(limit)
    larger = -(-11 * batch // 10)
    return {
        "limit": limit,
        "batch_size": batch,
        "allocator_peak": subject.measure(batch).allocator_peak,
        "larger_batch_size": larger,
        "larger_allocator_peak": subject.measure(larger).allocator_peak,
    }


def commands() -> Iterator[dict[str, Any]]:
    """Cost of the comparison of three methods, as a user runs it."""
    for name, arguments in (
        ("CIFAR", []),
        ("ImageNet", ["--image-size", "224", "--classes", "1000", "--batch-size", "1024"]),
    ):
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        started = time.perf_counter()
        # Not ru_maxrss, which a process inherits from its parent.
        program = f"import bench.footprints as b; b.profile.main({arguments!r}); print(b.status('VmHWM'))"
        out = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
        yield {
            "command": name,
            "seconds": round(time.perf_counter() - started, 1),
            "cpu_seconds": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before, 1),
            "host_memory": int(out.splitlines()[-1]),
        }


def _elsewhere(task: str, method: str, flags: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.footprints", "--task", json.dumps([task, method, flags])]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="JSON file with the results")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.task:
        task, method, flags = json.loads(given.task)
        print(json.dumps({"measure": measure, "resident": resident, "fit": fit}[task](method, flags)))
        return
    if not given.out:
        parser.error("--out is missing")
    head = header("python", "-m", "bench.footprints", "--out", str(given.out))
    rows: list[dict[str, Any]] = []
    for part in (passes, steps, commands, fits, measurements):
        for row in part():
            rows.append(row)
            print(json.dumps(row), flush=True)
    write(given.out, head, rows)


if __name__ == "__main__":
    main()
