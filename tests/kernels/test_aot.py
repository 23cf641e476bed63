"""Kernels compile ahead of time, in a process of its own because the interpreter's flag must not be set there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "triton_aot.py"
RESULTS = ROOT / "bench" / "results" / "triton_aot.json"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """One supernet shape of every op, compiled for sm_90 in float16."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("aot")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run(
        [sys.executable, SCRIPT, "--quick", "--arch", "90", "--dtype", "float16", "--out", folder / "rows.json"],
        check=True,
        cwd=ROOT,
        env={**environment, "TRITON_CACHE_DIR": str(folder / "cache")},
    )
    return json.loads((folder / "rows.json").read_text())["rows"]


def kernels_on_disk() -> set[str]:
    text = "".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    return {line.split("(")[0].removeprefix("def ") for line in text.splitlines() if "_kernel(" in line[:60]} - {""}


# These read and write sums and weights, which are never half-width.
ON_SUMS = {
    "ordered_sum_kernel",
    "norm_mixed_sum_combine_kernel",
    "norm_mixed_sum_scale_kernel",
    "norm_mixed_sum_sums_kernel",
    "stage_sums_kernel",
    "stage_statistics_kernel",
}


def test_every_kernel_compiles_without_spilling(rows: list[dict]) -> None:
    assert {row["kernel"] for row in rows} == {name for name in kernels_on_disk() if name.endswith("_kernel")}
    assert [row for row in rows if row["spilled_bytes"]] == []


def test_registers_and_shared_memory_leave_room_for_several_blocks(rows: list[dict]) -> None:
    for row in rows:
        assert 0 < row["registers"] <= 255
        assert row["shared_bytes"] <= 48 * 1024


def test_the_committed_table_covers_every_kernel_architecture_and_dtype() -> None:
    table = json.loads(RESULTS.read_text())["rows"]
    assert {row["arch"] for row in table} == {"sm_80", "sm_90"}
    for kernel in (name for name in kernels_on_disk() if name.endswith("_kernel")):
        dtypes = {row["dtype"] for row in table if row["kernel"] == kernel}
        if kernel in ON_SUMS:
            assert dtypes and dtypes <= {"fp32", "fp64"}, kernel
        else:
            assert dtypes == {"fp32", "fp64", "fp16", "bf16"}, kernel
    assert [row for row in table if row["spilled_bytes"]] == []
