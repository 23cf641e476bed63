"""Run two versions of a computation on the same inputs: largest difference, and the median time of each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def side_by_side(
    name: str, plain: Callable[[], Tensor], fused: Callable[[], Tensor], leaves: Sequence[Tensor], *, runs: int = 15
) -> float:
    """Print a line, and return the largest difference of values and gradients relative to the largest value.

    `plain` and `fused` give one tensor; `leaves` are the tensors whose gradients are compared and timed too.
    """

    gradient = torch.randn_like(plain())  # what would come back from the layers behind

    def step(compute: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        y = compute()
        return y, *torch.autograd.grad(y, leaves, gradient)

    pairs = [(a.detach(), b.detach()) for a, b in zip(step(plain), step(fused), strict=True)]
    difference = max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in pairs)

    times: dict[str, list[float]] = {"plain": [], "fused": []}
    for _ in range(runs):  # in turn, so that a busy machine slows both
        for key, compute in (("plain", plain), ("fused", fused)):
            start = time.perf_counter()
            step(compute)
            times[key].append(time.perf_counter() - start)
    medians = {key: 1e3 * statistics.median(values) for key, values in times.items()}
    print(
        f"{name:<34} plain {medians['plain']:8.2f} ms   fused {medians['fused']:8.2f} ms   "
        f"{medians['plain'] / medians['fused']:5.2f}x   largest difference {difference:.1e}"
    )
    return difference
