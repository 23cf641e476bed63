"""Floating-point operations, against the definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastnas.ops import depthwise_bank
from fastnas.ops.stages.conv_stage import conv_stage_bwd, conv_stage_fwd
from fastnas.profiler.tracker import Tracker


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_backward_of_a_convolution_costs_one_pass_a_gradient(groups: int, transposed: bool) -> None:
    convolve = F.conv_transpose2d if transposed else F.conv2d
    x = torch.ones(2, 8, 6, 6, requires_grad=True)
    weight = torch.ones(8, 8 // groups, 3, 3, requires_grad=True)
    with Tracker() as tracker:
        convolve(x, weight, padding=1, groups=groups).sum().backward()
    forward = 2 * (2 * 8 * 6 * 6) * (8 // groups) * 9
    assert tracker.flops["backward"] == 2 * forward

    x.requires_grad_(False)
    with Tracker() as tracker:
        convolve(x, weight, padding=1, groups=groups).sum().backward()
    assert tracker.flops["backward"] == forward


def test_pytorch_still_miscounts_grouped_convolutions() -> None:
    """When this fails, PyTorch counts groups itself, and fastnas.profiler.flops needs no formula for it."""
    x, weight = torch.ones(2, 8, 6, 6, requires_grad=True), torch.ones(8, 1, 3, 3, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        F.conv2d(x, weight, padding=1, groups=8).sum().backward()
    forward = 2 * (2 * 8 * 6 * 6) * 9
    assert counter.get_total_flops() == forward + (1 + 8) * forward


@pytest.mark.parametrize("stride", [1, 2])
def test_a_depthwise_bank_costs_what_its_convolutions_cost(stride: int) -> None:
    weights = [torch.ones(4, 1, k, k, requires_grad=True) for k in (3, 5)]

    def count(bank: bool) -> dict[str, int]:
        x = torch.ones(2, 4, 7, 7, requires_grad=True)
        with Tracker() as tracker:
            if bank:
                outputs = depthwise_bank(x, weights, [1, 2], stride=stride, max_pool=True)[:2]
            else:
                paddings = (1, 4)
                outputs = [
                    F.conv2d(x.relu(), w, stride=stride, padding=p, dilation=d, groups=4)
                    for w, p, d in zip(weights, paddings, (1, 2), strict=True)
                ]
            sum(y.sum() for y in outputs).backward()
        return tracker.flops

    assert count(bank=True) == count(bank=False)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution_stage_costs_what_its_convolutions_cost(stride: int) -> None:
    """Two separable parts and a 1x1 one on maps [2, 7, 7, 4], counted by hand: 2 for a multiply-add."""
    x = torch.ones(2, 7, 7, 4)
    depthwise = [torch.ones(4, 1, 3, 3), torch.ones(4, 1, 5, 5), torch.empty(0)]
    pointwise = [torch.ones(4, 4, 1, 1) for _ in range(3)]
    parts = [0, 0, 0, 1, 0, 0, 1, 0, 2, 0, 0, 2, 0, 1, 0]
    pixels = 2 * 7 * 7 if stride == 1 else 2 * 4 * 4
    deep, point = 2 * pixels * 4 * (9 + 25), 2 * pixels * 4 * 4 * 3

    with Tracker() as tracker:
        z, _ = conv_stage_fwd([x], None, parts, depthwise, pointwise, stride, True)
    assert tracker.flops["forward"] == deep + point

    def backward(need_dx: bool, need_dw: bool) -> int:
        coef, maps = torch.ones(3, 4, 4), list(z.unbind())
        with Tracker() as tracker:
            conv_stage_bwd(maps, maps, coef, [x], None, parts, depthwise, pointwise, stride, None, need_dx, need_dw)
        return tracker.flops["forward"]  # by hand, not under autograd

    # dz goes back through the pointwise weights to both gradients; those of the pointwise weights need the depthwise
    # outputs, which are computed again.
    assert backward(True, False) == point + deep
    assert backward(True, True) == 2 * (deep + point) + deep
