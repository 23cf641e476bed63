from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastnas import _ext

ROOT = Path(__file__).parents[1]
HAS_CUDA_SOURCES = any((ROOT / "csrc").rglob("*.cu"))


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
        pytest.param(
            {"FASTNAS_CUDA": "1"},
            "CUDA     no: FASTNAS_CUDA=1 was asked for, but there are no CUDA sources",
            marks=pytest.mark.skipif(HAS_CUDA_SOURCES, reason="there are CUDA sources"),
        ),
    ],
    ids=["cuda-off", "no-compiler", "cuda-asked-for"],
)
def test_decisions_are_printed_with_their_reason(env: dict[str, str], line: str) -> None:
    done = decisions(**env)
    assert done.returncode == 0, done.stderr
    assert "fastnas build decisions" in done.stdout
    assert line in done.stdout


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


@pytest.mark.skipif(_ext.load() is not None, reason="fastnas._C is not built")
def test_the_build_is_recorded() -> None:
    facts = _ext.build_facts()
    assert facts["native"] is True
    assert "csrc/ops/mixed_sum.cpp" in facts["sources"]
    assert {"torch", "torch_target", "compiler", "cuda", "cuda_reason"} <= set(facts)


def test_without_a_compiler_the_package_is_built_and_says_what_it_lacks(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "build", "--build-base", str(tmp_path)]
    env = {**os.environ, "CXX": "no-such-compiler"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    built = tmp_path / "lib" / "fastnas"
    assert not list(built.glob("_C*")) and (built / "kernels" / "mixed_sum.py").exists()
    facts = json.loads((built / "_build.json").read_text())
    assert facts["native"] is False and "no C++ compiler found" in facts["native_reason"]
