"""Memory as the device's allocator counts it: independent of the tracker, and aware of scratch space in kernels."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd.profiler import profile


def peak_of(changes: Iterable[int]) -> int:
    """The highest level that a series of allocations (positive) and releases (negative) reaches, from level 0."""
    return max(itertools.accumulate(changes, initial=0))


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Peak extra bytes of ``run()``, its results included; warm it up first.

    On the CPU it is counted, not sampled: torch's allocator reports each allocation and release. Memory that does not
    come from it (small C++ buffers, scratch space inside oneDNN) is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = run()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # or the profiler complains where a CUDA build finds no GPU
    with profile(profile_memory=True) as recorded:
        kept = run()
        del kept
    # The raw results: the events that torch.profiler makes of them take a minute for the step of a supernet.
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return peak_of(event.nbytes() for event in events)
