from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from fastnas.reference.depthwise_bank import depthwise_bank as reference
from fastnas.testing import DTYPES

op = importlib.import_module("fastnas.ops.depthwise_bank").depthwise_bank
DARTS = ((3, 1), (5, 1), (3, 2), (5, 2))  # sizes and dilations of an edge's separable and dilated convolutions
PAIR = ((3, 1), (3, 2))
SHAPES = {"one-pixel": (1, 1, 1, 1), "odd": (2, 5, 7, 9), "even": (3, 4, 12, 8)}


def inputs(shape: tuple[int, ...], dtype: torch.dtype, last: bool, branches=DARTS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    x = x.to(memory_format=torch.channels_last) if last else x
    ws = [torch.randn(shape[1], 1, k, k, generator=generator, dtype=torch.float64) / k for k, _ in branches]
    return [x, *(w.to(dtype) for w in ws)]


def caller(branches=DARTS, **options):
    """All outputs side by side, so that every branch gets a gradient of its own."""

    def call(f, x: Tensor, *ws: Tensor) -> Tensor:
        return torch.cat([y.flatten() for y in f(x, ws, [d for _, d in branches], **options)])

    return call


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*(("odd", dtype) for dtype in DTYPES), *((name, torch.float32) for name in ("one-pixel", "even"))],
    ids=str,
)
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels-last"])
@pytest.mark.parametrize("stride", [1, 2])
def test_value_and_every_gradient(check, name: str, dtype: torch.dtype, stride: int, last: bool) -> None:
    tensors = inputs(SHAPES[name], dtype, last, PAIR)
    check(caller(PAIR, stride=stride, max_pool=True, avg_pool=True), op, reference, tensors)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_bank_of_a_darts_edge(check, stride: int) -> None:
    tensors = inputs((1, 2, 6, 5), torch.float32, False)
    check(caller(stride=stride, max_pool=True, avg_pool=True), op, reference, tensors)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("pools", [(False, False), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("branches", [(), ((1, 1),), ((3, 3), (1, 1))], ids=str)
def test_any_branches(check, relu: bool, pools: tuple[bool, bool], branches) -> None:
    if not branches and not any(pools):
        branches = ((7, 1),)
    tensors = inputs((2, 3, 10, 11), torch.float32, False, branches)
    check(caller(branches, relu=relu, max_pool=pools[0], avg_pool=pools[1]), op, reference, tensors)


def test_several_programs_and_a_tail(check) -> None:
    branches = ((3, 1),)
    tensors = inputs((2, 3, 53, 50), torch.float32, False, branches)
    check(caller(branches, max_pool=True), op, reference, tensors)


def test_several_groups_of_channels_and_a_kernel_that_reaches_far(check) -> None:
    branches = ((3, 9),)
    tensors = inputs((1, 17, 6, 5), torch.float32, True, branches)
    check(caller(branches), op, reference, tensors)


def test_more_branches_than_one_launch_takes(check) -> None:
    branches = (*[(1, 1)] * 8, (3, 2))
    tensors = inputs((2, 3, 6, 5), torch.float32, False, branches)
    check(caller(branches, max_pool=True), op, reference, tensors)


@pytest.mark.parametrize("kind", ["sliced", "cropped", "expanded", "transposed"])
def test_any_strides(check, kind: str) -> None:
    x, *ws = inputs((2, 4, 9, 9), torch.float32, False, ((3, 1),))
    if kind == "sliced":
        x = torch.randn(2, 8, 9, 9)[:, 4:]
    elif kind == "cropped":
        x = torch.randn(2, 4, 12, 12)[:, :, 1:10, 2:11]
    elif kind == "expanded":
        x = x[:1].expand(2, 4, 9, 9)
    else:
        x = x.transpose(2, 3)
    check(caller(((3, 1),), max_pool=True, avg_pool=True), op, reference, [x, *ws])


@pytest.mark.parametrize("trained", ["x", "weights"])
def test_frozen_inputs(device: torch.device, trained: str) -> None:
    tensors = [t.to(device) for t in inputs(SHAPES["odd"], torch.float32, True, PAIR)]
    leaves = tensors[:1] if trained == "x" else tensors[1:]
    for t in leaves:
        t.requires_grad_()
    results = [
        torch.autograd.grad(caller(PAIR, max_pool=True)(f, *tensors).square().sum(), leaves) for f in (op, reference)
    ]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_pooling_treats_equals_and_nan_as_max_pool2d(device: torch.device) -> None:
    x = torch.randint(0, 2, (2, 3, 9, 7), generator=torch.Generator().manual_seed(0)).float().to(device)
    x[0, 0, 4, 4] = x[1, 2, 0, 1] = torch.nan
    x[1, 1] = -torch.inf
    for stride in (1, 2):
        results = []
        for f in (op, reference):
            leaf = x.clone().requires_grad_()
            (y,) = f(leaf, [], [], stride=stride, max_pool=True)
            g = torch.arange(float(y.numel()), device=device).view_as(y)
            results.append((y, *torch.autograd.grad(y, leaf, g)))
        torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


def test_empty_batch(device: torch.device) -> None:
    x = torch.empty(0, 3, 5, 5, device=device, requires_grad=True)
    w = torch.ones(3, 1, 3, 3, device=device, requires_grad=True)
    y, pooled = op(x, [w], [1], stride=2, max_pool=True)
    assert y.shape == pooled.shape == (0, 3, 3, 3)
    dx, dw = torch.autograd.grad(y, [x, w], y)
    assert dx.shape == x.shape
    assert torch.equal(dw, torch.zeros_like(w))
