from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastnas
from fastnas import _backends, _ext
from fastnas.errors import UserError

XS = [torch.ones(2, 3), torch.ones(2, 3)]
W = torch.tensor([1.0, 2.0])
needs_library = pytest.mark.skipif(_ext.load("cpu") is not None, reason="fastnas._C is not built")


def served(stem: str) -> str:
    return next(row.backend for row in _backends.table() if (row.op, row.device) == (stem, "cpu"))


@needs_library
def test_native_is_the_automatic_choice_on_the_cpu() -> None:
    assert {row.backend for row in _backends.table() if row.device == "cpu"} == {"native"}


@needs_library
def test_the_context_manager_overrides_one_op_or_all_and_restores() -> None:
    with fastnas.backend("mixed_sum=reference"):
        assert (served("mixed_sum"), served("path_dropout")) == ("reference", "native")
        with fastnas.backend("native"):
            assert served("mixed_sum") == "native"
        assert served("mixed_sum") == "reference"
    assert served("mixed_sum") == "native"


def test_the_choice_decides_what_runs() -> None:
    y = fastnas.mixed_sum(XS, W.clone().requires_grad_())
    with fastnas.backend("reference"):
        plain = fastnas.mixed_sum(XS, W.clone().requires_grad_())
    assert plain.grad_fn.name() != "_MixedSumBackward"
    assert y.grad_fn.name() == "_MixedSumBackward" or _ext.load("cpu")


def test_a_device_without_kernels_runs_the_reference_and_refuses_native() -> None:
    meta = [x.to("meta") for x in XS]
    assert fastnas.mixed_sum(meta, W.to("meta")).shape == (2, 3)
    if _ext.load("cpu") is None:
        with fastnas.backend("native"), pytest.raises(UserError, match="no kernels for device type 'meta'"):
            fastnas.mixed_sum(meta, W.to("meta"))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fast", "no backend is called 'fast'.*backends: native, triton, cuda, reference"),
        ("mixed_sum=fast", "no backend is called 'fast'"),
        ("mixed=reference", "no op is called 'mixed'.*mixed_sum"),
    ],
)
def test_unknown_names_are_refused_and_change_nothing(spec: str, message: str) -> None:
    before = _backends.table()
    with pytest.raises(UserError, match=message), fastnas.backend(spec):
        pass
    assert _backends.table() == before


@needs_library
@pytest.mark.skipif(_ext.build_facts().get("cuda", False), reason="the library was built with CUDA")
def test_cuda_is_refused_by_a_library_without_it_and_the_reason_is_that_of_the_build() -> None:
    reason = re.escape(_ext.build_facts()["cuda_reason"])
    with pytest.raises(UserError, match=f"built without CUDA: {reason}"), fastnas.backend("mixed_sum=cuda"):
        pass


def test_cuda_goes_before_triton_for_the_ops_of_the_table_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends, "_CUDA_FIRST", frozenset({"mixed_sum"}))
    assert _backends._preferred("mixed_sum") == ("cuda", "native", "triton", "reference")
    assert _backends._preferred("path_dropout") == ("native", "triton", "cuda", "reference")


@pytest.mark.parametrize("spec", ["reference", "mixed_sum=reference"])
def test_the_environment_variable_overrides(spec: str) -> None:
    code = "from fastnas import _backends; print({r.op: (r.backend, r.reason) for r in _backends.table()})"
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "FASTNAS_BACKEND": spec},
    ).stdout
    assert f"'mixed_sum': ('reference', \"asked for by '{spec}'\")" in out


def test_a_wrong_environment_variable_is_one_clear_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastnas.search", "--epochs", "1", "--quiet", "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env={**os.environ, "FASTNAS_BACKEND": "bogus"},
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "bogus" in done.stderr
