"""What fits: free memory of a device, and the largest batch within a limit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

SMALLEST_BATCH = 2  # what batch normalisation of one pixel a channel needs


def largest_batch(
    peak: Callable[[int], int], limit: int, *, start: int = 64, minimum: int = SMALLEST_BATCH, maximum: int = 1 << 20
) -> int | None:
    """The largest batch size whose `peak` is at most `limit` bytes; None when not even `minimum` is.

    `peak` must not fall as the batch grows. It is close to a straight line, so a few calls find the place: each guess
    is where the line through the nearest two sizes meets the limit, and the answer is exact.
    """
    known: dict[int, int] = {}
    low, high = minimum - 1, maximum + 1  # what is at most low fits, what is at least high does not
    guess = start
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        known[guess] = peak(guess)
        low, high = (guess, high) if known[guess] <= limit else (low, guess)
        guess = _where_line_meets(known, limit)
    return low if low >= minimum else None


def _where_line_meets(known: dict[int, int], limit: int) -> int:
    nearest = sorted(known, key=lambda batch: abs(known[batch] - limit))[:2]
    first, second = sorted(nearest) if len(nearest) == 2 else (0, nearest[0])
    slope = (known[second] - known.get(first, 0)) / (second - first)
    return second if slope <= 0 else int(first + (limit - known.get(first, 0)) / slope)


def free_memory(device: torch.device | str) -> int | None:
    """Bytes that a program can still take on the device, the caches of this one included; None if nobody knows.

    On the CPU it is what Linux calls available, or what is left of the control group's limit if that is less.
    """
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        left = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no control group of version 2, or no limit
        return available
    return max(0, min(available, left))
