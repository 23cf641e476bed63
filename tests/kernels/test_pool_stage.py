from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastnas.ops._library import accumulate_dtype
from fastnas.ops.stages import pool_stage

SHAPES = [(1, 1, 1, 1), (3, 5, 7, 3), (2, 17, 18, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pools_statistics_and_gradient(device, near, shape: tuple[int, ...], stride: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch, height, width, channels = shape
    x = torch.randn(batch, height, width, channels + 3, dtype=dtype, device=device)[..., 3:]
    ours = pool_stage.pool_stage_fwd(x, stride, True)
    for value, expected in zip(ours, pool_stage._fwd_reference(x.double(), stride, True), strict=True):
        near(value, expected)
    alone, none = pool_stage.pool_stage_fwd(x, stride, False)
    assert torch.equal(alone, ours[0])
    assert none.numel() == 0
    out = (batch, -(-height // stride), -(-width // stride))
    gs = [torch.randn(*out, channels + gap, dtype=dtype, device=device)[..., gap:] for gap in (0, 5, 0)]
    scales, coef = (torch.randn(n, 3, channels, dtype=accumulate_dtype(dtype), device=device) for n in (3, 2))
    for base in (None, torch.randn(batch, height, width, 2 * channels, dtype=dtype, device=device)[..., channels:]):
        exact = (x.double(), [g.double() for g in gs], scales.double(), coef.double(), stride)
        expected = pool_stage._bwd_reference(*exact, None if base is None else base.double())
        near(pool_stage.pool_stage_bwd(x, gs, scales, coef, stride, base), expected)


def test_a_large_mean_costs_no_precision(device, near) -> None:
    x = torch.randn(2, 17, 33, 4, device=device) + 1000
    _, stats = pool_stage.pool_stage_fwd(x, 1, True)
    near(stats[:, 1], pool_stage._fwd_reference(x.double(), 1, True)[1][:, 1], 1e-3)


@pytest.mark.parametrize("stride", [1, 2])
def test_equals_and_nan_are_treated_as_by_max_pool2d(device: torch.device, stride: int) -> None:
    x = torch.randint(0, 2, (2, 9, 7, 3), generator=torch.Generator().manual_seed(0)).float().to(device)
    x[0, 4, 4, 0] = x[1, 0, 1, 2] = torch.nan
    x[1, ..., 1] = -torch.inf
    leaf = x.permute(0, 3, 1, 2).clone().requires_grad_()
    y = F.max_pool2d(leaf, 3, stride, 1)
    g = torch.arange(float(y.numel()), device=device).view_as(y)
    (expected,) = torch.autograd.grad(y, leaf, g)
    pooled, _ = pool_stage.pool_stage_fwd(x, stride, False)
    torch.testing.assert_close(pooled[0].permute(0, 3, 1, 2), y.detach(), rtol=0, atol=0, equal_nan=True)
    finite = torch.nan_to_num(x, nan=9.0, neginf=-9.0)  # NaN times a coefficient of 0 is NaN
    leaf = finite.permute(0, 3, 1, 2).clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.max_pool2d(leaf, 3, stride, 1), leaf, g)
    scales, coef = torch.zeros(1, 3, 3, device=device), torch.zeros(2, 3, 3, device=device)
    scales[:, 0] = 1
    dx = pool_stage.pool_stage_bwd(finite, [g.permute(0, 2, 3, 1).contiguous()], scales, coef, stride, None)
    torch.testing.assert_close(dx.permute(0, 3, 1, 2), expected)


def test_empty_batch(device: torch.device) -> None:
    x = torch.empty(0, 5, 5, 4, device=device)
    pooled, stats = pool_stage.pool_stage_fwd(x, 2, True)
    assert pooled.shape == (2, 0, 3, 3, 4)
    assert stats.shape == (2, 2, 4)
    scales, coef = torch.ones(1, 3, 4, device=device), torch.ones(2, 3, 4, device=device)
    assert pool_stage.pool_stage_bwd(x, [pooled[0]], scales, coef, 2, None).shape == x.shape
