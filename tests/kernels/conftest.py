"""The kernels are tested on a GPU, or on CPU tensors with ``TRITON_INTERPRET=1``, as ``test_interpreter.py`` does."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

import fastnas
from fastnas.testing import CASES, Case, assert_as_accurate, poisoned_empty

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]


# What storing in bfloat16 costs at most: a GPU rounds to 8 bits, the interpreter cuts off behind them.
ROUNDED = torch.finfo(torch.bfloat16).eps


# The interpreter gets a smaller one instead of the large case; it still takes several programs and leaves a tail.
TENSORS = [c for c in CASES if c.name != "large" or not INTERPRETED] + [Case("tail", (3, 7, 37, 23))]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", TENSORS, ids=str)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device on which every op runs on its Triton kernels during the test."""
    with fastnas.backend("triton"):
        yield torch.device(request.param)


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
