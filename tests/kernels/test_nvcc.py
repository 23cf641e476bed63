"""The committed table of bench/nvcc.py is complete, and says that no CUDA kernel spills."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "nvcc.json"


def kernels_on_disk() -> set[str]:
    texts = [path.read_text() for path in (ROOT / "csrc").rglob("*.cuh")]
    return {name for text in texts for name in re.findall(r"(\w+_kernel)\(", text)}


def test_the_committed_table_covers_every_kernel_architecture_and_dtype() -> None:
    table = json.loads(RESULTS.read_text())["rows"]
    assert {row["arch"] for row in table} == {"sm_80", "sm_90a"}
    assert {row["kernel"] for row in table} == kernels_on_disk() != set()
    for kernel in kernels_on_disk():
        for arch in ("sm_80", "sm_90a"):
            rows = [row for row in table if (row["kernel"], row["arch"]) == (kernel, arch)]
            assert {row["constants"].partition(",")[0] for row in rows} == {"float", "double", "BFloat16", "Half"}
            assert not any(row["spilled_bytes"] for row in rows)
            assert all(row["stack_bytes"] <= 32 for row in rows)  # the four sums of depthwise_bank_dx_kernel, by index
            assert all(0 < row["registers"] <= 128 and row["shared_bytes"] <= 48 * 1024 for row in rows)


def test_the_report_of_ptxas_is_read() -> None:
    spec = importlib.util.spec_from_file_location("nvcc", ROOT / "bench" / "nvcc.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    report = (
        "ptxas info    : Compiling entry function '_ZN7fastnas10fwd_kernelIfLi4EEEvPf' for 'sm_90a'\n"
        "ptxas info    : Function properties for _ZN7fastnas10fwd_kernelIfLi4EEEvPf\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 4096 bytes smem\n"
    )
    assert module.rows_of(report, "a.cu") == [
        {
            "source": "a.cu",
            "kernel": "fwd_kernel",
            "constants": "float, 4",
            "arch": "sm_90a",
            "registers": 40,
            "spilled_bytes": 16,
            "stack_bytes": 8,
            "shared_bytes": 4096,
        }
    ]
