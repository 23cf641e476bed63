from __future__ import annotations

import os
import subprocess
import sys

import pytest

import fastnas


def run(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **env}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_nothing_heavy() -> None:
    heavy = {"torch", "torchvision", "triton", "rich", "matplotlib", "sklearn", "fastnas.ops", "fastnas._C"}
    assert run(f"import sys, fastnas; print({heavy!r} & set(sys.modules))") == "set()"


def test_import_takes_less_than_a_tenth_of_a_second_beyond_torch() -> None:
    code = "import torch, time; t = time.perf_counter(); import fastnas; print(time.perf_counter() - t)"
    assert min(float(run(code)) for _ in range(3)) < 0.1


def test_importing_the_ops_touches_no_cuda_and_no_triton_kernel() -> None:
    code = """
import sys, torch
def forbidden(*args, **kwargs): raise AssertionError("CUDA was touched")
torch.cuda.current_device = torch.cuda._lazy_init = forbidden
import fastnas, fastnas.ops, fastnas.kernels
fastnas.mixed_sum([torch.ones(2)], torch.ones(1))
print(torch.cuda.is_initialized(), "triton" in sys.modules)
"""
    assert run(code) == "False False"


def test_every_public_name_resolves_and_unknown_ones_do_not() -> None:
    for name in fastnas.__all__:
        assert getattr(fastnas, name) is not None
    assert set(fastnas.__all__) <= set(dir(fastnas))
    with pytest.raises(AttributeError, match="no_such_name"):
        fastnas.no_such_name  # noqa: B018


def test_works_without_the_compiled_library() -> None:
    code = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "fastnas._C" else find(name, *a)
import torch, fastnas
from fastnas import _backends
print({row.backend for row in _backends.table()})
y = fastnas.mixed_sum([torch.ones(2), torch.ones(2)], torch.tensor([1.0, 2.0]))
try:
    with fastnas.backend("native"):
        pass
except ValueError as error:
    print(y.tolist(), error)
"""
    lines = run(code).splitlines()
    assert lines[0] == "{'reference'}"
    assert lines[1].startswith("[3.0, 3.0] backend 'native' asked for")
    assert "fastnas._C is missing" in lines[1]


def test_a_library_that_does_not_load_is_named_with_both_versions() -> None:
    code = """
import importlib, warnings
load = importlib.import_module
def broken(name, *args):
    if name == "fastnas._C":
        raise ImportError("undefined symbol: x")
    return load(name, *args)
importlib.import_module = broken
import torch
from fastnas import _ext
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    reason = _ext.load()
print(len(caught), torch.__version__ in reason, "was built for torch" in reason, "undefined symbol" in reason)
"""
    assert run(code) == "1 True True True"
