from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from fastnas.kernels import _launch  # noqa: E402

CONFIGS = Path(_launch.__file__).with_name("configs")
ROWS = [{"dtypes": ["float16"], "up_to": 100, "BN": 1}, {"up_to": 100, "BN": 2}, {"BN": 3}]


@pytest.mark.parametrize(
    ("dtype", "size", "expected"),
    [(torch.float16, 100, 1), (torch.float32, 100, 2), (torch.float16, 101, 3), (torch.float32, 10**12, 3)],
)
def test_the_first_row_that_holds_is_used(dtype: torch.dtype, size: int, expected: int) -> None:
    assert _launch.pick(ROWS, dtype, size) == {"BN": expected}


def test_a_table_without_a_row_for_the_size_is_refused() -> None:
    with pytest.raises(LookupError, match="float32 and 101 elements"):
        _launch.pick(ROWS[:2], torch.float32, 101)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_tables_know_only_kernels_of_the_default_and_end_with_an_unconditional_row(path: Path) -> None:
    default = json.loads((CONFIGS / "default.json").read_text())["kernels"]
    kernels = json.loads(path.read_text())["kernels"]
    assert set(kernels) <= set(default)
    for name, rows in kernels.items():
        assert not {"up_to", "dtypes"} & set(rows[-1]), name
        for row in rows:
            blocks = [value for key, value in row.items() if key.startswith("B")]
            assert blocks, name
            assert all(value & (value - 1) == 0 for value in blocks), name


def test_a_gpu_without_a_table_gets_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(64, 16, 32, 32, device="meta")
    monkeypatch.setattr(_launch, "_device_name", lambda device: "a_gpu_of_tomorrow")
    expected = json.loads((CONFIGS / "default.json").read_text())["kernels"]["mixed_sum_fwd"][-1]
    assert _launch.config("mixed_sum_fwd", x) == expected


def test_gpu_names_become_file_names(monkeypatch: pytest.MonkeyPatch) -> None:
    _launch._cuda_name.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    assert _launch._cuda_name(0) == "h200"
    _launch._cuda_name.cache_clear()


def test_the_package_imports_without_triton_and_no_kernel_is_loaded_by_the_cpu() -> None:
    code = """
import sys
import torch, fastnas, fastnas.kernels
fastnas.mixed_sum([torch.ones(2)], torch.ones(1))
print("triton" in sys.modules, "fastnas.kernels.mixed_sum" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_backends_change_places_behind_the_same_flat_ops() -> None:
    code = """
import sys
import torch, fastnas
x, w = [torch.ones(2, 3)], torch.full((1,), 2.0)
for name in ("native", "triton", "native", "triton", "reference"):
    before = "fastnas.kernels.mixed_sum" in sys.modules
    with fastnas.backend(f"mixed_sum={name}"):
        y = fastnas.mixed_sum(x, w.requires_grad_())
    print(name, before, "fastnas.kernels.mixed_sum" in sys.modules, y.unique().tolist())
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines() == [
        "native False False [2.0]",
        "triton False True [2.0]",
        "native True True [2.0]",
        "triton True True [2.0]",
        "reference True True [2.0]",
    ], done.stderr


def test_triton_asked_for_on_the_cpu_is_refused_with_the_reason() -> None:
    import fastnas

    with fastnas.backend("triton"), pytest.raises(fastnas.errors.UserError, match="TRITON_INTERPRET=1"):
        fastnas.mixed_sum([torch.ones(2)], torch.ones(1))
