"""Clocks, percentiles, and the timing of several rivals in turn."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]
Clock = Callable[[], float]


def percentile(values: Sequence[float], percent: float) -> float:
    """Percentile with linear interpolation between the two nearest values."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("percentile of no values")
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def ratio(rival: Sequence[float], ours: Sequence[float]) -> float:
    """How many times longer the rival took: the median of the ratios round by round.

    A machine that slows down for a while slows both runs of a round, and leaves their ratio alone.
    """
    return statistics.median(theirs / mine for theirs, mine in zip(rival, ours, strict=True))


@dataclass
class Turns:
    """Runs timed in turn (A B C A B C ...), so that all of them meet the machine in the same state.

    ``samples[name]`` holds the seconds of each round. One round times ``others()`` and then ``last()``, the two
    halves that ``benchmark.pedantic`` takes as set-up and target.
    """

    clocks: dict[str, Clock]
    last_name: str
    samples: dict[str, list[float]] = field(init=False)

    def __post_init__(self) -> None:
        self.samples = {name: [] for name in self.clocks}

    def others(self) -> None:
        for name in self.clocks:
            if name != self.last_name:
                self._time(name)

    def last(self) -> None:
        self._time(self.last_name)

    def rounds(self, budget: float, least: int = 7, most: int = 200) -> int:
        """Rounds that take about ``budget`` seconds, by one round that is not kept."""
        took = sum(clock() for clock in self.clocks.values())
        return max(least, min(most, int(budget / max(took, 1e-9))))

    def _time(self, name: str) -> None:
        enabled = gc.isenabled()
        gc.disable()
        try:
            self.samples[name].append(self.clocks[name]())
        finally:
            if enabled:
                gc.enable()


def host_clock(run: Run) -> Clock:
    """Seconds of a call by the host's clock; what it gives is freed inside, as a training step does."""

    def clock() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return clock


def cuda_clock(run: Run) -> Clock:
    """Seconds of the GPU between two events, with a flushed L2 cache.

    The GPU is kept busy while the host enqueues the call, so that its kernels run back to back as in a CUDA graph;
    what the host spends is measured by bench/test_overhead.py.
    """
    device = torch.cuda.current_device()
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(4 * max(l2_bytes, 2**24), dtype=torch.int8, device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    enqueue = time.perf_counter() - start
    torch.cuda.synchronize()
    cycles = int(2 * enqueue * _cycles_per_second())

    def clock() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(cycles)
        flush.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return clock


def _cycles_per_second() -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1000)
    begin.record()
    torch.cuda._sleep(10_000_000)
    end.record()
    end.synchronize()
    return 1e10 / begin.elapsed_time(end)


def clock_for(run: Run, device: torch.device) -> Clock:
    """The clock of a device around ``run``, which has been called up to three times, for half a second, to warm up."""
    end = time.perf_counter() + 0.5
    run()
    for _ in range(2):
        if time.perf_counter() < end:
            run()
    return cuda_clock(run) if device.type == "cuda" else host_clock(run)


def copy_of(nbytes: int, device: torch.device) -> Callable[[], Tensor]:
    """A ``Tensor.copy_`` that reads and writes ``nbytes`` in all: what memory can do at this size."""
    source = torch.ones(max(nbytes // 8, 1), device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
