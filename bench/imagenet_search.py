"""What a step of PC-DARTS's ImageNet search costs one process: compute, memory, messages and images read.

    torchrun --standalone --nproc-per-node 2 bench/imagenet_search.py --out bench/results/imagenet_search.json

The first process measures alone, on one thread and in CPU seconds, while the other waits; the message goes between
both. On GPUs times are wall times. Memory and FLOPs are the profiler's predictions for the share of one process of
eight. The worked-out estimate is in docs/distributed.md.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

if not __package__:
    sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.report import header
from fastnas import distributed, processes
from fastnas._files import replace_file
from fastnas.cli import run_command
from fastnas.engine.training import settled_heap
from fastnas.search import Plan, build_method, resolve, search_step

CLASSES, IMAGE = 1000, (3, 224, 224)
GPUS = 8
ROUNDS = 5
PHOTOGRAPH = (375, 500)  # height and width of a usual picture of ImageNet


def plan_of(executor: str, batch_size: int) -> Plan:
    return resolve({"preset": "pc_darts-imagenet", "executor": executor, "batch_size": batch_size})


def milliseconds(work: Callable[[], object], device: torch.device) -> float:
    """Median of a few runs after one that warms up."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    times = []
    for _ in range(ROUNDS + 1):
        started = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - started)
    return 1000 * statistics.median(times[1:])


def step_times(executor: str, batch_size: int, device: torch.device) -> dict[str, float]:
    """Milliseconds of the two halves of a step on `batch_size` images."""
    method: Any = build_method(plan_of(executor, batch_size), CLASSES, IMAGE[0], device, IMAGE[1])
    method.start_epoch(method.weights.epochs - 1)
    batch = torch.randn(batch_size, *IMAGE, device=device), torch.arange(batch_size, device=device) % CLASSES
    with settled_heap():
        return {
            "weight_step_ms": milliseconds(lambda: method.weight_step(batch), device),
            "architecture_step_ms": milliseconds(lambda: method.architecture_step(batch, batch), device),
        }


def footprint(executor: str) -> dict[str, Any]:
    """The profiler's prediction for one process of eight."""
    batch = plan_of(executor, 1024).weights.batch_size // GPUS
    predicted = search_step(plan_of(executor, batch), CLASSES, IMAGE, torch.device("cuda")).predict()
    return {
        "batch_size": batch,
        "peak_bytes": predicted.peak,
        "saved_bytes": predicted.saved_bytes,
        "flops": predicted.flops,
        "operations": predicted.operations,
        "parameters": predicted.parameters,
    }


def decode_ms() -> float:
    """CPU milliseconds to read and crop one photograph, as a training batch does."""
    height, width = PHOTOGRAPH
    rows, columns = np.mgrid[0:height, 0:width]
    smooth = np.stack([rows * 255 / height, columns * 255 / width, (rows + columns) % 256], -1)
    noisy = smooth + np.random.default_rng(0).normal(0, 12, smooth.shape)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    crop = v2.Compose([v2.RandomResizedCrop(IMAGE[1], antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()])

    def read() -> None:
        for _ in range(20):
            crop(Image.open(io.BytesIO(file.getvalue())).convert("RGB"))

    return milliseconds(read, torch.device("cpu")) / 20


def message_ms(parameters: int, device: torch.device) -> float:
    """Wall milliseconds to average the gradients of that many weights over the processes."""
    gradients = [torch.randn(parameters, device=device)]
    distributed.wait_for_all()
    times = []
    for _ in range(4 * ROUNDS):
        started = time.perf_counter()
        distributed.average(gradients)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=8, help="images of the timed steps [8]")
    parser.add_argument("--executors", default="plain,fused", help="comma-separated [plain,fused]")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    device = distributed.own_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    rows: dict[str, Any] = {}
    if processes.is_main():
        with processes.alone():
            for executor in given.executors.split(","):
                times = step_times(executor, given.batch, device)
                rows[executor] = {"batch_size": given.batch, **times, "one_of_eight": footprint(executor)}
    parameters = distributed.of_main(next(iter(rows.values()))["one_of_eight"]["parameters"] if rows else 0)
    report = {
        **header("torchrun", "--standalone", "--nproc-per-node", "2", "bench/imagenet_search.py", *arguments),
        "clock": "CPU time of one thread" if device.type == "cpu" else "wall time",
        "rows": rows,
        "message": {
            "processes": processes.world_size(),
            "parameters": parameters,
            "ms": message_ms(parameters, device),
        },
        "decode_ms": decode_ms() if processes.is_main() else None,
    }
    replace_file(given.out, [(json.dumps(report, indent=1) + "\n").encode()])
    return 0


if __name__ == "__main__":
    run_command(main, several=True)
