"""How long a network takes for a batch of images on the device at hand."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

WARM_UP = 3  # runs that are not counted: caches, kernels chosen, clocks risen
LEAST_RUNS, MOST_RUNS = 5, 200


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one batch, over `runs` runs: the median and the 20th and 80th percentile."""

    batch: int
    median_ms: float
    low_ms: float
    high_ms: float
    runs: int


def measure_latency(
    network: nn.Module,
    image: Sequence[int],
    batch_sizes: Sequence[int] = (1, 32),
    *,
    device: str | torch.device = "cpu",
    seconds: float = 1.0,
) -> list[Latency]:
    """Time `network` in evaluation mode, float32, on random images of shape [C, H, W]; about `seconds` for each batch.

    The network is moved to `device` and stays there. A GPU is waited for after every run, so that launches count too.
    """
    device = torch.device(device)
    network = network.to(device).eval()
    results = []
    for batch in batch_sizes:
        images = torch.randn(batch, *image, device=device)
        times: list[float] = []
        with torch.inference_mode():
            for _ in range(WARM_UP):
                network(images)
            end = time.perf_counter() + seconds
            while len(times) < LEAST_RUNS or (time.perf_counter() < end and len(times) < MOST_RUNS):
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                start = time.perf_counter()
                network(images)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times.append(1000 * (time.perf_counter() - start))
        low, *_, high = statistics.quantiles(times, n=5)
        results.append(Latency(batch, statistics.median(times), low, high, len(times)))
    return results
