from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastnas.ops._library import accumulate_dtype
from fastnas.ops.stages import partial_join

CASES = [((1, 1, 1, 4), 4), ((3, 5, 7, 6), 2), ((2, 9, 16, 12), 3), ((2, 17, 18, 16), 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("shape", "k"), CASES, ids=str)
def test_join_and_both_gradients(device, near, shape: tuple[int, ...], k: int, stride: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    batch, height, width, channels = shape

    def draw(*shape: int, gap: int = 0) -> Tensor:
        return torch.randn(*shape[:-1], shape[-1] + gap, dtype=dtype, device=device)[..., gap:]

    size = (batch, -(-height // stride), -(-width // stride))
    xs, mixed = [draw(*shape, gap=3), draw(*size, channels)], draw(*size, channels // k, gap=1)
    strides, betas, out = [stride, 1], draw(2).to(accumulate_dtype(dtype)), draw(*size, channels, gap=5)
    expected, doubles = out.double(), [x.double() for x in xs]
    partial_join.partial_join(out, mixed, xs, strides, betas, k)
    partial_join._join_reference(expected, mixed.double(), doubles, strides, betas.double(), k)
    near(out, expected)
    g = draw(*size, channels, gap=2)
    ours = partial_join.partial_join_bwd(g, xs, strides, k)
    for value, want in zip(ours, partial_join._bwd_reference(g.double(), doubles, strides, k), strict=True):
        near(value, want)
    alone, none = partial_join.partial_join_bwd(g, [], [], k)
    assert torch.equal(alone, ours[0]) and none.shape == (0,)
    gs, d_mixed = [g, draw(*size, channels)], draw(*shape[:3], channels // k, gap=4)
    for base in (None, draw(*shape, gap=7)):
        exact = (doubles[0], [g.double() for g in gs], betas.double(), stride, k, d_mixed.double())
        want = partial_join._dx_reference(*exact, None if base is None else base.double())
        near(partial_join.partial_join_dx(xs[0], gs, betas, stride, k, d_mixed, base), want)


def test_the_first_of_equal_maxima_takes_the_gradient(device: torch.device) -> None:
    x = torch.randint(0, 2, (2, 7, 9, 8), generator=torch.Generator().manual_seed(0)).double().to(device)
    g, betas = torch.randn(2, 4, 5, 8, dtype=torch.double, device=device), x.new_ones(1)
    mixed = x.new_zeros(2, 7, 9, 2)
    expected = partial_join._dx_reference(x, [g], betas, 2, 4, mixed, None)
    assert torch.equal(partial_join.partial_join_dx(x, [g], betas, 2, 4, mixed, None), expected)


def test_empty_batch(device: torch.device) -> None:
    x, mixed = torch.empty(0, 4, 4, 8, device=device), torch.empty(0, 4, 4, 2, device=device)
    partial_join.partial_join(x, mixed, [x], [1], torch.ones(1, device=device), 4)
    d_mixed, d_betas = partial_join.partial_join_bwd(x, [x], [1], 4)
    assert d_mixed.shape == mixed.shape
    assert torch.equal(d_betas, torch.zeros(1, device=device))
