"""The kernels are tested on a GPU, and without one by other means.

Triton's run on CPU tensors with ``TRITON_INTERPRET=1``, as ``test_interpreter.py`` does; those in CUDA C++ are compiled
for the host, where ``cuda_host/`` runs the threads of a block one after the other.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastnas
from fastnas import _backends, _ext
from fastnas import ops as _ops  # noqa: F401  registers the ops
from fastnas.testing import CASES, Case, assert_as_accurate, poisoned_empty

ROOT = Path(__file__).parents[2]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("triton", "cuda")]

# What storing in bfloat16 costs at most: a GPU rounds to 8 bits, the interpreter cuts off behind them.
ROUNDED = torch.finfo(torch.bfloat16).eps

# What runs one element at a time gets a smaller case than the large one; it still takes several blocks and has a tail.
SLOW = INTERPRETED or not torch.cuda.is_available()
TENSORS = [c for c in CASES if c.name != "large" or not SLOW] + [Case("tail", (3, 7, 37, 23))]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", TENSORS, ids=str)
    if "device" in metafunc.fixturenames:
        in_cuda = (ROOT / "csrc" / "ops" / "cuda" / f"{_stem(metafunc.module)}.cu").is_file()
        runs = ["interpreter"] if INTERPRETED else [*GPU, "cuda_on_host"] if in_cuda else GPU[:1]
        metafunc.parametrize("device", runs, indirect=True)


def _stem(module: object) -> str:
    return module.__name__.rpartition(".")[2].removeprefix("test_")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device on which the module's op runs on its kernels during the test."""
    stem = _stem(request.module)
    if request.param == "cuda_on_host":
        with _cuda_on_host(stem):
            yield torch.device("cpu")
    elif request.param == "cuda":
        if problem := _backends._problem("cuda", stem, "cuda"):
            pytest.skip(problem)
        with fastnas.backend(f"{stem}=cuda"):
            yield torch.device("cuda")
    else:
        with fastnas.backend("triton"):
            yield torch.device("cpu" if request.param == "interpreter" else "cuda")


@contextlib.contextmanager
def _cuda_on_host(stem: str) -> Iterator[None]:
    """The CUDA kernels of an op serve the CPU inside."""
    if _ext.load("cpu") is not None:
        pytest.skip("fastnas._C is not built")
    _load_on_host(stem)
    ops = torch.library.Library("fastnas", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel", UserWarning)
            for flat in _backends._flat_ops[stem]:
                ops.impl(flat, getattr(torch.ops.fastnas_cuda_on_host, flat), "CPU", allow_override=True)
        with fastnas.backend("native"):
            yield
    finally:
        ops._destroy()


@functools.cache
def _load_on_host(stem: str) -> torch.library.Library:
    """Compile and load csrc/ops/cuda/<stem>.cu for the host; its ops are in ``torch.ops.fastnas_cuda_on_host``."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    torch_home = Path(torch.__file__).parent
    ops = torch.library.Library("fastnas_cuda_on_host", "FRAGMENT")
    for flat in _backends._flat_ops[stem]:
        ops.define(str(getattr(torch.ops.fastnas, flat).default._schema).removeprefix("fastnas::"))
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / f"{stem}.so"
        command = [compiler, "-shared", "-fPIC", "-std=c++20", "-O1", "-fvisibility=hidden", "-fopenmp-simd"]
        command += ["-Wall", "-Werror", "-Wno-psabi", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE"]
        command += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]  # a GPU would stop as well
        command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f'-DFASTNAS_SOURCE="ops/cuda/{stem}.cu"']
        command += [f"-I{Path(__file__).parent / 'cuda_host'}", f"-I{ROOT / 'csrc'}"]
        command += ["-isystem", str(torch_home / "include"), str(Path(__file__).parent / "cuda_host" / "ops.cpp")]
        command += [f"-L{torch_home / 'lib'}", "-lc10", "-ltorch_cpu", "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        torch.ops.load_library(library)
    return ops


@pytest.fixture
def check(device: torch.device) -> Callable[..., None]:
    """``check(call, op, reference, tensors)``: the output and every gradient, by the tolerance rule.

    ``call(f, *tensors)`` is one output of ``f``, which is the op or its reference; tensors that are None or not
    floating get no gradient. What the op allocates is poisoned.
    """

    def go(
        call: Callable[..., Tensor], op: Callable[..., Tensor], reference: Callable[..., Tensor], tensors: Sequence
    ) -> None:
        tensors = [t if t is None else _moved(t, device) for t in tensors]
        shape = call(reference, *tensors)
        g = torch.randn(shape.shape, generator=torch.Generator().manual_seed(9)).to(shape.dtype).to(device)
        with poisoned_empty():
            ours = _run(call, op, tensors, g)
        eager = _run(call, reference, tensors, g)
        doubles = [t if t is None or not t.is_floating_point() else t.double() for t in tensors]
        exact = _run(call, reference, doubles, g.double())
        for value, theirs, truth in zip(ours, eager, exact, strict=True):
            if value.dtype == torch.float64:  # as exact as the oracle itself
                torch.testing.assert_close(value, truth, rtol=1e-13, atol=1e-14)
            else:
                assert_as_accurate(value, theirs, truth)

    return go


def _moved(t: Tensor, device: torch.device) -> Tensor:
    """``t`` on ``device`` with the strides that it has, whatever they are."""
    if t.device == device:
        return t
    span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    memory = torch.as_strided(t, (span,), (1,), t.storage_offset()).to(device)
    return torch.as_strided(memory, t.shape, t.stride(), 0)


def _run(call: Callable[..., Tensor], f: Callable[..., Tensor], tensors: Sequence, g: Tensor) -> tuple[Tensor, ...]:
    leaves = [t if t is None or not t.is_floating_point() else t.detach().requires_grad_() for t in tensors]
    y = call(f, *leaves)
    return y, *torch.autograd.grad(y, [t for t in leaves if t is not None and t.requires_grad], g)


@pytest.fixture
def near() -> Callable[..., None]:
    """``near(value, exact)``: a norm-wise comparison with float64, for sums over thousands of pixels."""

    def check(value: Tensor, exact: Tensor, tolerance: float | None = None) -> None:
        if tolerance is None:
            tolerance = {torch.float64: 1e-12, torch.bfloat16: ROUNDED}.get(value.dtype, 2e-5)
        assert value.shape == exact.shape
        error = float((value.double() - exact.double()).norm())
        assert error <= tolerance * float(exact.double().norm().clamp_min(1e-30))

    return check
