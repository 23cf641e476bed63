"""Huge pages for the memory that a training loop takes again at every step."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

MADV_COLLAPSE = 25  # since Linux 6.1: make huge pages of those that are there already
HUGE_PAGE = 2 << 20
SETTLED = 2  # steps after which further ones find their memory where earlier ones left it


def collapse_heap() -> int:
    """Let the heap of this process lie on huge pages from now on; returns the bytes that do, 0 where the system
    cannot.

    A step on the CPU walks over some hundred megabytes, a few kilobytes here and there: with small pages the
    processor looks up addresses all the time. Tensors that come and go at every step find the same memory again, so
    once is enough, after the first steps (`SETTLED`).
    """
    collapsed = 0
    for begin, end in _heaps():
        first, last = -(-begin // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
        if first < last and _madvise(first, last - first, MADV_COLLAPSE):
            collapsed += last - first
    return collapsed


def _heaps() -> Iterator[tuple[int, int]]:
    """Where malloc keeps what the main thread allocates."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        if line.endswith("[heap]"):
            begin, end = line.split()[0].split("-")
            yield int(begin, 16), int(end, 16)


def _madvise(begin: int, size: int, advice: int) -> bool:
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise(begin, size, advice) == 0
