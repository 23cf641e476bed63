"""Memory of a training loop on huge pages: what lies there stays, and systems that have none go on."""

import mmap
import re
from pathlib import Path

import pytest
import torch

from fastnas import retrain, search
from fastnas.engine import huge_pages


def huge_bytes() -> int:
    found = re.search(r"AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    return 1024 * int(found[1])


def test_what_lies_on_the_heap_stays_and_lies_on_huge_pages_then():
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("not Linux")
    values = [torch.arange(50_000, dtype=torch.float32) + number for number in range(200)]  # 40 MB in small pieces
    before = huge_bytes()
    collapsed = huge_pages.collapse_heap()
    if not collapsed:
        pytest.skip("this kernel collapses nothing")
    assert collapsed % huge_pages.HUGE_PAGE == 0
    assert huge_bytes() >= before
    assert all(value[7] == 7 + number and value[-1] == 49_999 + number for number, value in enumerate(values))


@pytest.mark.skipif(not hasattr(mmap, "MAP_PRIVATE"), reason="not POSIX")
def test_a_mapping_of_small_pages_becomes_huge(monkeypatch):
    block = mmap.mmap(-1, 4 * huge_pages.HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block[:] = bytes(len(block))
    address = torch.frombuffer(block, dtype=torch.uint8).data_ptr()
    before = huge_bytes() if Path("/proc/self/smaps_rollup").exists() else 0
    monkeypatch.setattr(huge_pages, "_heaps", lambda: [(address, address + len(block))])
    collapsed = huge_pages.collapse_heap()
    if not collapsed:
        pytest.skip("this kernel collapses nothing")
    assert collapsed >= 3 * huge_pages.HUGE_PAGE
    assert huge_bytes() - before >= collapsed - huge_pages.HUGE_PAGE


def test_where_there_is_no_such_thing_nothing_happens(monkeypatch):
    monkeypatch.setattr(huge_pages, "_madvise", lambda *_: False)
    assert huge_pages.collapse_heap() == 0
    monkeypatch.setattr(huge_pages, "Path", lambda _: Path("/nowhere"))
    assert huge_pages.collapse_heap() == 0


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (search, ["--method=darts", "--epochs=2", "--cells=3", "--nodes=2", "--batch-size=64"]),
        (retrain, ["--genotype=DARTS_V2", "--epochs=2", "--cells=3", "--batch-size=256", "--auxiliary-weight=0"]),
    ],
    ids=["search", "retrain"],
)
def test_a_search_and_a_retraining_ask_once(command, flags, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(command, "collapse_heap", lambda: calls.append(1))
    command.main([*flags, "--data=digits", "--channels=4", "--quiet", f"--out={tmp_path / 'run'}"])
    assert calls == [1]
