"""Where the time of a search's steps goes."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

# Functions of the methods that train the architecture; PARSEC weighs its children. Others do both in one pass.
ARCHITECTURE_STEPS = ("architecture_step", "_log_likelihoods")


class StepTimes:
    """Seconds of the host in the parts of some steps: no device is waited for, nothing is added to a step."""

    def __init__(self) -> None:
        self._seconds: Counter[str] = Counter()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time within the block as "data" or as "step"."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - started

    def watch(self, method: Any) -> None:
        """From now on count what the method's own functions for the architecture take."""
        for name in ARCHITECTURE_STEPS:
            if function := getattr(method, name, None):
                setattr(method, name, self.part("architecture")(function))

    def clear(self) -> None:
        """Start again from 0."""
        self._seconds.clear()

    def split(self) -> dict[str, float]:
        """As timing.jsonl has it; what no function for the architecture does in a step is the weights' share."""
        data, step, architecture = (self._seconds[part] for part in ("data", "step", "architecture"))
        return {"data_s": data, "weights_s": step - architecture, "architecture_s": architecture}


class MemoryUse:
    """Memory of a run, in bytes: on a GPU the peak of what PyTorch's allocator holds since `clear`, with the memory
    that recorded steps keep for themselves; else what the process has in main memory at the moment."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def clear(self) -> None:
        """Start a new peak."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def read(self) -> dict[str, int]:
        """As timing.jsonl has it; nothing where the system does not tell."""
        if self.device.type == "cuda":
            return {"memory_bytes": torch.cuda.max_memory_reserved(self.device)}
        size = resident_bytes()
        return {} if size is None else {"memory_bytes": size}


def resident_bytes() -> int | None:
    """Main memory that this process has; None where there is no /proc."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
