from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
importlib.util.find_spec = lambda name, *a: None if name.startswith("fastnas._C.") else find(name, *a)
import torch, fastnas, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from fastnas import _backends
    print({row.backend for row in _backends.table()}, len(caught), caught[0].message)
y = fastnas.mixed_sum([torch.ones(2), torch.ones(2)], torch.tensor([1.0, 2.0]))
try:
    with fastnas.backend("native"):
        pass
except ValueError as error:
    print(y.tolist(), error)
"""
    lines = run(code).splitlines()
    assert lines[0].startswith("{'reference'} 1 the compiled library fastnas._C is missing: ")
    assert "plain PyTorch runs instead, slower; build it with: pip install" in lines[0]
    assert lines[1].startswith("[3.0, 3.0] backend 'native' asked for")
    assert "fastnas._C is missing" in lines[1]


def test_a_library_that_does_not_load_is_named_with_both_versions() -> None:
    code = """
import importlib, warnings
load = importlib.import_module
def broken(name, *args):
    if name.startswith("fastnas._C."):
        raise ImportError("undefined symbol: x")
    return load(name, *args)
importlib.import_module = broken
import torch
from fastnas import _ext
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    reason = _ext.load("cpu")
print(len(caught), torch.__version__ in reason, "was built for torch" in reason, "undefined symbol" in reason)
"""
    assert run(code) == "1 True True True"


def test_a_cuda_part_that_does_not_load_leaves_the_kernels_of_the_cpu() -> None:
    code = """
import importlib, warnings
load = importlib.import_module
def broken(name, *args):
    if name == "fastnas._C.cuda":
        raise ImportError("libcudart.so: cannot open shared object file")
    return load(name, *args)
importlib.import_module = broken
import torch, fastnas
from fastnas import _ext
found = _ext._found
_ext._found = lambda name: name == "cuda" or found(name)
warnings.simplefilter("error")
y = fastnas.mixed_sum([torch.ones(2), torch.ones(2)], torch.tensor([1.0, 2.0]).requires_grad_())
print(type(y.grad_fn).__name__ == "_MixedSumBackward" or _ext.load("cpu"), "libcudart" in _ext.load("cuda"))
try:
    with fastnas.backend("mixed_sum=cuda"):
        pass
except ValueError as error:
    print("libcudart" in str(error))
"""
    assert run(code).splitlines() == ["True True", "True"]


BLOCK = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *rest: None if name.split(".")[0] in BLOCKED else find(name, *rest))
"""


def test_works_without_torchvision_and_triton(tmp_path: Path) -> None:
    """A search runs; data sets that need torchvision say so, and cuda says that triton is missing."""
    for name in (f"class{index % 2}/{index}.png" for index in range(10)):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(b"")
    code = f"""
BLOCKED = {{"torchvision", "triton", "onnx", "safetensors", "tensorboard"}}
{BLOCK}
from pathlib import Path
from fastnas import _backends, data, search
from fastnas.data import folder
folder.RESIDENT_LIMIT = 0
print(_backends._problem("triton", "mixed_sum", "cuda"))
for spec in ("cifar10", "folder:{tmp_path / "images"}"):
    try:
        data.load(spec, image_size=8)
    except ValueError as error:
        print(error)
small = {{"epochs": 1, "channels": 4, "cells": 3, "nodes": 2, "threads": 1, "batch_size": 256, "method": "darts"}}
print(search.run_search(search.resolve(small), Path("{tmp_path}") / "run", quiet=True).genotype.rule)
"""
    lines = run(code).splitlines()
    assert lines[0] == "triton is not installed"
    assert lines[1].startswith("cifar10 needs a torchvision that fits this torch (No module named 'torchvision')")
    assert "streaming it needs a torchvision that fits this torch" in lines[2] and "pip install torchvision" in lines[2]
    assert lines[3] == "top2"
