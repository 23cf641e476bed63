"""The library is compiled once for each instruction set; a processor with the best one runs the others too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastnas import _ext

ROOT = Path(__file__).parents[1]
SETS = ("avx512", "avx2", "baseline")
OWN = torch.backends.cpu.get_cpu_capability().lower()


@pytest.mark.parametrize(
    ("used", "built", "expected"),
    [
        ("AVX512", {"avx512", "avx2", "baseline"}, ["avx512"]),
        ("AVX2", {"avx512", "avx2", "baseline"}, ["avx2"]),
        ("DEFAULT", {"avx512", "avx2", "baseline"}, ["baseline"]),
        ("SVE256", {"baseline"}, ["baseline"]),
        ("AVX2", {"avx512", "avx2", "baseline", "cuda"}, ["avx2", "cuda"]),
        ("AVX512", set(), []),
    ],
)
def test_the_best_library_that_the_processor_runs_is_loaded(
    used: str, built: set[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: used)
    monkeypatch.setattr(_ext, "_found", lambda name: name in built)
    assert list(_ext.modules().values()) == [f"fastnas._C.{name}" for name in expected]


@pytest.mark.skipif(_ext.load("cpu") is not None, reason="fastnas._C is not built")
@pytest.mark.skipif(OWN not in SETS, reason="the processor has one instruction set only")
@pytest.mark.parametrize("name", SETS[1:])
def test_ops_and_fused_executor_pass_with_each_instruction_set(name: str) -> None:
    if SETS.index(name) <= SETS.index(OWN):
        pytest.skip("the other tests run with it, or the processor lacks it")
    env = {**os.environ, "ATEN_CPU_CAPABILITY": "default" if name == "baseline" else name}
    loaded = [sys.executable, "-c", "from fastnas import _ext; print(_ext.load('cpu'), _ext.modules())"]
    done = subprocess.run(loaded, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"None {{'cpu': 'fastnas._C.{name}'}}"
    # What torch.compile and opcheck do does not depend on it.
    kept = ["-k", "not compile and not opcheck and not gradgradcheck"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/ops", *kept]
    done = subprocess.run(
        [*command, "tests/engine/test_fused.py"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
