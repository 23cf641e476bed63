from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastnas
from fastnas.reference.mixed_sum import mixed_sum as reference
from fastnas.testing import DTYPES, Case

K = 6


def call(f, w: Tensor, *xs: Tensor) -> Tensor:
    return f(xs, w)


def weights_for(count: int) -> Tensor:
    return torch.softmax(torch.linspace(-1, 1, count), 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_every_gradient(check, case: Case, dtype: torch.dtype) -> None:
    check(call, fastnas.mixed_sum, reference, [weights_for(K), *case.tensors(K, dtype)])


@pytest.mark.parametrize("count", [1, 2, 7, 8, 64, 130])
def test_any_number_of_tensors(check, count: int) -> None:
    check(call, fastnas.mixed_sum, reference, [weights_for(count), *Case("odd", (3, 5, 7, 9)).tensors(count)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "start"), [(1000, 0), (1000, 1), (1000, 8), (1001, 0)])
def test_rows_of_larger_tensors_from_any_element_on(check, width: int, start: int, dtype: torch.dtype) -> None:
    xs = [torch.randn(3, width, dtype=torch.float64).to(dtype)[:, start : start + 960] for _ in range(K)]
    check(call, fastnas.mixed_sum, reference, [weights_for(K), *xs])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_in_the_dtype_of_the_maps(check, dtype: torch.dtype) -> None:
    xs = Case("odd", (3, 5, 7, 9)).tensors(K, dtype)
    check(call, fastnas.mixed_sum, reference, [weights_for(K).to(dtype), *xs])


def test_node_level_weights_are_taken_row_by_row(check) -> None:
    xs = Case("odd", (2, 3, 5, 5)).tensors(6)
    check(call, fastnas.mixed_sum, reference, [torch.rand(3, 2).T, *xs])  # [2, 3], column by column in memory


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frozen_weights(device: torch.device, dtype: torch.dtype) -> None:
    xs = [x.to(device).requires_grad_() for x in Case("tail", (3, 7, 37, 23)).tensors(3, dtype)]
    w = weights_for(3).to(device)
    y = fastnas.mixed_sum(xs, w)
    for dx, wk in zip(torch.autograd.grad(y, xs, torch.ones_like(y)), w, strict=True):
        torch.testing.assert_close(dx, wk.to(dtype).expand(dx.shape), rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_output_and_gradients_keep_the_layout(device: torch.device, layout: str) -> None:
    xs = [x.to(device).requires_grad_() for x in Case("map", (2, 4, 6, 5), layout).tensors(3)]
    y = fastnas.mixed_sum(xs, weights_for(3).to(device))
    for t in (y, *torch.autograd.grad(y, xs, y)):
        assert t.stride() == xs[0].stride()


def test_weight_gradients_are_the_same_every_time(device: torch.device) -> None:
    xs = [x.to(device) for x in Case("tail", (3, 7, 37, 23)).tensors(3)]
    w = weights_for(3).to(device).requires_grad_()
    first, second = (torch.autograd.grad(fastnas.mixed_sum(xs, w).square().sum(), w)[0] for _ in range(2))
    assert torch.equal(first, second)
