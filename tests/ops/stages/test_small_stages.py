"""node_sum, pool_stage and partial_join: compiled kernels against the reference, references against plain PyTorch."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from fastnas import _backends
from fastnas.ops.stages import node_sum, partial_join, pool_stage

CASES = list(itertools.product((1, 3, 4, 8, 16, 20, 32, 64), ((1, 1, 1), (3, 5, 7), (2, 17, 33)), (0, 3)))
DTYPES = [torch.float64, torch.float32]
native = pytest.mark.skipif(_backends.choose("node_sum", "cpu") != "native", reason="no compiled kernels")


def close(value, expected):
    """A norm-wise comparison: sums over thousands of pixels."""
    tolerance = 1e-12 if expected.dtype == torch.float64 else 2e-5
    assert float((value - expected).norm()) <= tolerance * float(expected.norm().clamp_min(1e-30))


def maker(dtype, gap):
    return lambda batch, height, width, channels: torch.randn(batch, height, width, channels + gap, dtype=dtype)[
        ..., gap:
    ]


@native
@pytest.mark.parametrize("dtype", DTYPES)
def test_node_sum(dtype):
    torch.manual_seed(0)
    for channels, size, gap in CASES:
        make = maker(dtype, gap)
        for count in (1, 3, 6):
            terms, coef = [make(*size, channels) for _ in range(count)], torch.randn(count, 2, channels, dtype=dtype)
            for accumulate in (False, True):
                out = make(*size, channels)
                expected = out.clone()
                node_sum.node_sum(out, terms, coef, accumulate)
                node_sum._sum_reference(expected, terms, coef, accumulate)
                close(out, expected)
        gs = [make(*size, channels) for _ in terms]
        close(node_sum.node_dots(gs, terms, coef[:, 0]), node_sum._dots_reference(gs, terms, coef[:, 0]))


@native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [1, 2])
def test_pool_stage(stride, dtype):
    torch.manual_seed(0)
    for channels, (batch, height, width), gap in CASES:
        make = maker(dtype, gap)
        x = make(batch, height, width, channels)
        for value, expected in zip(
            pool_stage.pool_stage_fwd(x, stride, True), pool_stage._fwd_reference(x, stride, True), strict=True
        ):
            close(value, expected)
        gs = [make(batch, -(-height // stride), -(-width // stride), channels) for _ in range(3)]
        scales, coef = torch.randn(3, 3, channels, dtype=dtype), torch.randn(2, 3, channels, dtype=dtype)
        for base in (None, make(batch, height, width, channels)):
            given = (x, gs, scales, coef, stride, base)
            close(pool_stage.pool_stage_bwd(*given), pool_stage._bwd_reference(*given))


@native
@pytest.mark.parametrize("values", [(0.0, 1.0), (-0.0, 0.0)], ids=str)
@pytest.mark.parametrize("channels", [4, 5, 16, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_maxima_send_the_gradient_to_the_first_of_them_as_pytorch_does(dtype, channels, values):
    """Zeros of both signs are equal."""
    torch.manual_seed(0)
    x = torch.tensor(values, dtype=dtype)[torch.randint(2, (2, 6, 7, channels))]
    g = torch.randn(2, 6, 7, channels, dtype=dtype)
    scales, coef = torch.zeros(1, 3, channels, dtype=dtype), torch.zeros(2, 3, channels, dtype=dtype)
    scales[:, 0] = 1
    leaf = x.permute(0, 3, 1, 2).clone().requires_grad_()
    (expected,) = torch.autograd.grad(F.max_pool2d(leaf, 3, 1, 1), leaf, g.permute(0, 3, 1, 2))
    torch.testing.assert_close(pool_stage.pool_stage_bwd(x, [g], scales, coef, 1, None).permute(0, 3, 1, 2), expected)


@native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("k", [2, 4])
def test_partial_join(k, stride, dtype):
    torch.manual_seed(0)
    for channels, (batch, height, width), gap in CASES:
        if channels % k:
            continue
        make = maker(dtype, gap)
        size = (batch, -(-height // stride), -(-width // stride))
        xs = [make(batch, height, width, channels), make(*size, channels)]
        strides, betas, mixed = [stride, 1], torch.randn(2, dtype=dtype), make(*size, channels // k)
        out = make(*size, channels)
        expected = out.clone()
        partial_join.partial_join(out, mixed, xs, strides, betas, k)
        partial_join._join_reference(expected, mixed, xs, strides, betas, k)
        close(out, expected)
        g = make(*size, channels)
        for value, want in zip(
            partial_join.partial_join_bwd(g, xs, strides, k),
            partial_join._bwd_reference(g, xs, strides, k),
            strict=True,
        ):
            close(value, want)
        d_mixed = make(batch, height, width, channels // k)
        for base in (None, make(batch, height, width, channels)):
            given = (xs[0], [g, make(*size, channels)], betas, stride, k, d_mixed, base)
            close(partial_join.partial_join_dx(*given), partial_join._dx_reference(*given))


@native
@pytest.mark.parametrize("channels", [16, 32, 64])
@pytest.mark.parametrize("count", range(1, 9))
def test_partial_join_takes_any_number_of_inputs(count, channels):
    """They are read several at a time, and the selected channels of these widths as vectors."""
    torch.manual_seed(0)
    make = maker(torch.double, 0)
    size, strides, betas = (2, 3, 5), [1, 2, *[1] * 6][:count], torch.randn(count, dtype=torch.double)
    xs = [make(2, 3 * stride, 5 * stride, channels) for stride in strides]
    out, mixed = make(*size, channels), make(*size, channels // 4)
    expected = out.clone()
    partial_join.partial_join(out, mixed, xs, strides, betas, 4)
    partial_join._join_reference(expected, mixed, xs, strides, betas, 4)
    close(out, expected)
    gs = [make(*size, channels) for _ in range(count)]
    found = partial_join.partial_join_bwd(gs[0], xs, strides, 4)
    for value, want in zip(found, partial_join._bwd_reference(gs[0], xs, strides, 4), strict=True):
        close(value, want)
    alone, d_betas = partial_join.partial_join_bwd(gs[0], [], [], 4)
    assert torch.equal(alone, found[0]) and d_betas.shape == (0,)
    given = (xs[0], gs, betas, 1, 4, mixed, None)
    close(partial_join.partial_join_dx(*given), partial_join._dx_reference(*given))


@native
@pytest.mark.parametrize("offset", [0.0, 1e3, -1e6])
def test_statistics_hold_far_from_zero_and_where_the_first_rows_are_far_from_the_others(offset):
    """An image is measured around the mean of its first eighth. Bounds: 64 roundings of sums in float32, for the
    variance times 8."""
    torch.manual_seed(0)
    rounding = 64 * torch.finfo(torch.float32).eps / 2
    for channels in (3, 4, 16, 20):
        x = torch.randn(2, 16, 16, channels) + 1e4
        x[:, :2] += offset
        pooled, stats = pool_stage.pool_stage_fwd(x, 1, True)
        variance, mean = torch.var_mean(pooled.double(), dim=(1, 2, 3), correction=0)
        # The mean itself is rounded once, and is no further from the first eighth's than sqrt(7) deviations.
        bound = mean.abs() * torch.finfo(torch.float32).eps + 7**0.5 * rounding * variance.sqrt()
        assert ((stats[:, 0] - mean).abs() <= bound).all()
        assert ((stats[:, 1] / variance - 1).abs() <= 8 * rounding).all()


def test_partial_join_is_the_weighted_sum_of_partial_shuffles():
    """PC-DARTS: sum over the edges of beta times (mixed, bypass) with the channels shuffled."""
    from fastnas.ops import partial_shuffle

    torch.manual_seed(0)
    xs = [torch.randn(2, 8, 6, 6, dtype=torch.double) for _ in range(2)]
    mixed = [torch.randn(2, 2, 6, 6, dtype=torch.double) for _ in range(2)]
    betas = torch.rand(2, dtype=torch.double)
    one = torch.ones(1, dtype=torch.double)
    expected = sum(
        beta * partial_shuffle([part], one, x[:, 2:]) for beta, part, x in zip(betas, mixed, xs, strict=True)
    )
    out = torch.empty(2, 6, 6, 8, dtype=torch.double)
    total = sum(beta * part for beta, part in zip(betas, mixed, strict=True)).permute(0, 2, 3, 1).contiguous()
    partial_join.partial_join(out, total, [x.permute(0, 2, 3, 1).contiguous() for x in xs], [1, 1], betas, 4)
    torch.testing.assert_close(out.permute(0, 3, 1, 2), expected)
