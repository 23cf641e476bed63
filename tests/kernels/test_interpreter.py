"""Runs the value tests of every kernel in Triton's interpreter, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
STEMS = sorted(path.stem for path in (HERE.parents[1] / "kernels").glob("[a-z]*.py"))


def test_every_file_of_kernels_has_its_value_tests() -> None:
    assert STEMS
    assert [stem for stem in STEMS if not (HERE / f"test_{stem}.py").is_file()] == []


@pytest.mark.parametrize("stem", STEMS)
def test_kernels_give_the_reference_values_in_the_interpreter(stem: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / f"test_{stem}.py")],
        capture_output=True,
        text=True,
        check=False,
        cwd=HERE.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.fullmatch(r"\d+ passed in .*", done.stdout.strip().splitlines()[-1]), done.stdout[-4000:]
