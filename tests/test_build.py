from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastnas import _ext

ROOT = Path(__file__).parents[1]


def decisions(**env: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("setuptools")
    return subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **env},
    )


@pytest.mark.parametrize(
    ("env", "line"),
    [
        ({"FASTNAS_CUDA": "0"}, "CUDA     no: FASTNAS_CUDA=0"),
        ({"CXX": "no-such-compiler"}, "native   no: no C++ compiler found"),
    ],
    ids=["cuda-off", "no-compiler"],
)
def test_decisions_are_printed_with_their_reason(env: dict[str, str], line: str) -> None:
    done = decisions(**env)
    assert done.returncode == 0, done.stderr
    assert "fastnas build decisions" in done.stdout
    assert line in done.stdout


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
@pytest.mark.parametrize(
    ("release", "headers", "line"),
    [
        (None, True, "CUDA     no: FASTNAS_CUDA=1 was asked for, but {home}/bin/nvcc does not run, set CUDA_HOME"),
        ("9.2", True, "CUDA     no: FASTNAS_CUDA=1 was asked for, but nvcc is of CUDA 9 and torch of CUDA"),
        (torch.version.cuda, False, "CUDA     no: FASTNAS_CUDA=1 was asked for, but {home} has no CUDA headers"),
        (torch.version.cuda, True, "CUDA     yes: FASTNAS_CUDA=1"),
    ],
    ids=["no-nvcc", "other-major", "no-headers", "complete"],
)
def test_the_toolkit_decides_about_cuda(tmp_path: Path, release: str | None, headers: bool, line: str) -> None:
    for folder in ("bin", "include"):
        (tmp_path / folder).mkdir()
    if release:
        (tmp_path / "bin" / "nvcc").write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V1'\n")
        (tmp_path / "bin" / "nvcc").chmod(0o755)
    if headers:
        (tmp_path / "include" / "cuda_runtime.h").touch()
    done = decisions(FASTNAS_CUDA="1", CUDA_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert line.format(home=tmp_path) in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible")
def test_without_a_gpu_cuda_is_built_only_when_asked_for() -> None:
    assert "CUDA     no: " in decisions(FASTNAS_CUDA="").stdout


def test_a_wish_that_means_nothing_is_refused() -> None:
    done = decisions(FASTNAS_CUDA="yes")
    assert done.returncode == 1
    assert "FASTNAS_CUDA=yes is not understood, use 0 or 1" in done.stderr


def test_without_torch_one_line_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('not here')\n")
    done = decisions(PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("fastnas: install torch first")
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(_ext.load("cpu") is not None, reason="fastnas._C is not built")
def test_the_build_is_recorded() -> None:
    facts = _ext.build_facts()
    assert facts["native"] is True
    assert "csrc/ops/mixed_sum.cpp" in facts["sources"] and "baseline" in facts["instruction_sets"]
    assert {"torch", "torch_target", "compiler", "cuda", "cuda_reason"} <= set(facts)


def test_without_a_compiler_the_package_is_built_and_says_what_it_lacks(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "build", "--build-base", str(tmp_path)]
    env = {**os.environ, "CXX": "no-such-compiler"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    built = tmp_path / "lib" / "fastnas"
    assert not list(built.glob("_C/*.so")) and (built / "kernels" / "mixed_sum.py").exists()
    facts = json.loads((built / "_build.json").read_text())
    assert facts["native"] is False and "no C++ compiler found" in facts["native_reason"]
