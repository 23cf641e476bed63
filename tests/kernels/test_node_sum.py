from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastnas.ops._library import accumulate_dtype
from fastnas.ops.stages import node_sum

SHAPES = [(1, 1, 1, 1), (3, 5, 7, 3), (2, 17, 33, 16)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.fixture(params=[0, 3], ids=["dense", "spaced"])
def draw(request: pytest.FixtureRequest, device: torch.device):
    """``draw(*shape, dtype)``: a map, dense or with other channels between its pixels."""
    torch.manual_seed(0)
    gap = request.param

    def make(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape[:-1], shape[-1] + gap, dtype=dtype, device=device)[..., gap:]

    return make


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [1, 3, 6])
def test_the_sum_and_its_dots(draw, near, shape: tuple[int, ...], count: int, dtype: torch.dtype) -> None:
    terms = [draw(*shape, dtype=dtype) for _ in range(count)]
    terms[0] = terms[0].contiguous()  # terms need not share a pitch
    coef = torch.randn(count, 2, shape[-1], dtype=accumulate_dtype(dtype), device=terms[0].device)
    for accumulate in (False, True):
        out = draw(*shape, dtype=dtype)
        expected = out.double()
        node_sum.node_sum(out, terms, coef, accumulate)
        node_sum._sum_reference(expected, [t.double() for t in terms], coef.double(), accumulate)
        near(out, expected)
    gs = [draw(*shape, dtype=dtype) for _ in range(2)]
    gs = [gs[0], *gs[1:] * (count - 1)]  # neighbours share a gradient
    doubles = [[t.double() for t in ts] for ts in (gs, terms)]
    near(
        node_sum.node_dots(gs, terms, coef[:, 0]),
        node_sum._dots_reference(*doubles, coef[:, 0].double()),
    )


def test_the_output_may_be_a_term(device: torch.device, near) -> None:
    x, coef = torch.randn(2, 5, 5, 8, device=device), torch.randn(1, 2, 8, device=device)
    expected = coef[0, 0] * (x - coef[0, 1])
    node_sum.node_sum(x, [x], coef, False)
    near(x, expected)


def test_dots_of_many_terms_are_the_same_every_time(device: torch.device) -> None:
    terms, means = [torch.randn(3, 20, 30, 5, device=device) for _ in range(28)], torch.randn(28, 5, device=device)
    first, second = (node_sum.node_dots(terms, terms[::-1], means) for _ in range(2))
    assert torch.equal(first, second)


def test_channels_that_are_not_neighbours_are_refused(device: torch.device) -> None:
    x = torch.randn(2, 4, 5, 5, device=device).permute(0, 2, 3, 1)
    with pytest.raises(RuntimeError, match="channels of a map must be neighbours"):
        node_sum.node_sum(x, [x], torch.randn(1, 2, 4, device=device), False)


def test_empty_batch(device: torch.device) -> None:
    x, means = torch.empty(0, 5, 5, 4, device=device), torch.randn(1, 4, device=device)
    node_sum.node_sum(x, [x], torch.randn(1, 2, 4, device=device), True)
    assert torch.equal(node_sum.node_dots([x], [x], means), torch.zeros(1, 2, 4, device=device))
