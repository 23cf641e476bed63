"""The largest batch within a limit, sizes as text, and free memory."""

from __future__ import annotations

import pytest
import torch

from fastnas.errors import UserError
from fastnas.profiler.fit import free_memory, largest_batch
from fastnas.profiler.sizes import format_size, parse_size

PEAKS = {
    "line": lambda batch: 1000 + 37 * batch,
    "two lines": lambda batch: max(5000 + 3 * batch, 200 * batch),
    "steps": lambda batch: 512 * (1 + 7 * batch // 512),
    "flat": lambda batch: 10,
}


@pytest.mark.parametrize("start", [2, 64, 5000])
@pytest.mark.parametrize("limit", [1, 1100, 6000, 100_000])
@pytest.mark.parametrize("shape", PEAKS)
def test_it_is_the_largest_that_fits(shape: str, limit: int, start: int) -> None:
    peak = PEAKS[shape]
    expected = max((batch for batch in range(2, 3001) if peak(batch) <= limit), default=None)
    assert largest_batch(peak, limit, start=start, maximum=3000) == expected


def test_a_line_takes_few_predictions() -> None:
    calls = []
    assert largest_batch(lambda batch: calls.append(batch) or 1000 + 37 * batch, 10**9, start=64) == 1 << 20
    calls.clear()
    assert largest_batch(lambda batch: calls.append(batch) or 1000 + 37 * batch, 10**6, start=64) == 27000
    assert len(calls) <= 5


@pytest.mark.parametrize(
    ("text", "size"), [("12GiB", 12 * 2**30), ("12 GB", 12 * 10**9), ("1.5g", 3 * 2**29), ("512", 512), ("8kib", 8192)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "12 parsecs", "-3GB"])
def test_a_wrong_size_is_a_clear_error(text: str) -> None:
    with pytest.raises(UserError, match="such as 12GiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (8.0337e9, "8.03 GB"), (412.4e6, "412 MB"), (99_960_000, "100 MB"), (5e12, "5000 GB")],
)
def test_sizes_are_written_with_three_digits(size: float, text: str) -> None:
    assert format_size(size) == text


def test_free_memory_of_this_machine() -> None:
    free = free_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50
