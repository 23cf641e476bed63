import random

import pytest
import torch
import torch.nn.functional as F

from fastnas.engine.nasbench101 import Nasbench101Cell, Nasbench101Network, SlicedConv, SlicedNorm, vertex_widths
from fastnas.engine.training import batch_statistics, recalibrate
from fastnas.errors import UserError
from fastnas.spaces import Nasbench101Space
from fastnas.spaces.nasbench101 import PAIRS

SPACE = Nasbench101Space()
SIZE = {"channels": 6, "cells": 3, "classes": 3, "in_channels": 1}
DIAMOND = (((0, 1), (0, 2), (1, 3), (2, 3), (2, 4), (3, 4), (1, 4), (0, 4)), (0, 1, 2))


def images() -> torch.Tensor:
    return torch.randn(4, 1, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def test_vertices_that_lead_to_the_output_share_its_channels():
    assert vertex_widths(DIAMOND, 12) == [4, 4, 4]
    assert vertex_widths(DIAMOND, 14) == [5, 5, 4]  # the first ones take what is left over
    assert vertex_widths((((0, 1), (1, 2), (2, 3)), (0, 0)), 8) == [8, 8]
    assert vertex_widths((((0, 1),), ()), 8) == []
    # vertex 1 leads to 2 and 3, which have 5 and 4 channels
    assert vertex_widths((((0, 1), (1, 2), (1, 3), (2, 4), (3, 4)), (0, 0, 0)), 9) == [5, 5, 4]


def test_a_sliced_convolution_uses_the_first_kernels():
    torch.manual_seed(0)
    layer = SlicedConv(6, 8, 3, affine=True).double()
    with torch.no_grad():
        layer.norm.weight.uniform_(), layer.norm.bias.uniform_()
    x = torch.randn(2, 4, 5, 5, dtype=torch.double)
    y = F.conv2d(x, layer.conv.weight[:3, :4], padding=1)
    expected = F.batch_norm(y, None, None, layer.norm.weight[:3], layer.norm.bias[:3], training=True).relu()
    torch.testing.assert_close(layer(x, 3), expected)
    (gradient,) = torch.autograd.grad(layer(x, 3).square().sum(), layer.conv.weight)
    assert gradient[:3, :4].abs().min() > 0
    assert gradient[3:].abs().max() == gradient[:, 4:].abs().max() == 0


def test_statistics_of_a_slice_are_those_of_batch_norm():
    torch.manual_seed(0)
    x = torch.randn(3, 2, 4, 4)
    sliced, plain = SlicedNorm(5, affine=False), torch.nn.BatchNorm2d(2, affine=False)
    for momentum in (0.1, None):
        sliced.momentum = plain.momentum = momentum
        torch.testing.assert_close(sliced(x), plain(x))
        torch.testing.assert_close(sliced.running_var[:2], plain.running_var)
    assert torch.equal(sliced.running_mean[2:], torch.zeros(3)) and torch.equal(sliced.running_var[2:], torch.ones(3))
    torch.testing.assert_close(sliced.eval()(x), plain.eval()(x))


def test_a_cell_is_the_benchmarks():
    """Projections on the input's edges, sums of the first channels, concatenation, and the input's own projection."""
    torch.manual_seed(0)
    cell = Nasbench101Cell(3, 7, None).double()
    x = torch.randn(2, 3, 5, 5, dtype=torch.double)

    def convolve(layer: SlicedConv, x: torch.Tensor, width: int) -> torch.Tensor:
        weight = layer.conv.weight[:width, : x.shape[1]]
        return F.batch_norm(F.conv2d(x, weight, padding=weight.shape[-1] // 2), None, None, training=True).relu()

    first = convolve(cell.operations[0]["conv3x3"], convolve(cell.projections["1"], x, 3), 3)
    second = convolve(cell.operations[1]["conv1x1"], convolve(cell.projections["2"], x, 2), 2)
    third = F.max_pool2d(first[:, :2] + second, 3, 1, padding=1)
    expected = torch.cat([first, second, third], dim=1) + convolve(cell.projections["output"], x, 7)
    torch.testing.assert_close(cell(x, DIAMOND), expected)


def copy_slices(network: Nasbench101Network, supernet: Nasbench101Network) -> None:
    shared = dict(supernet.named_parameters())
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in shared:
                parameter.copy_(shared[name][tuple(map(slice, parameter.shape))])


def test_a_path_of_the_supernet_is_the_cell_alone_with_slices_of_the_weights():
    torch.manual_seed(0)
    supernet = Nasbench101Network(SPACE, **SIZE).double()
    rng = random.Random(0)
    for _ in range(5):
        genotype = SPACE.random_genotype(rng)
        alone = Nasbench101Network(SPACE, **SIZE, only=genotype).double()
        copy_slices(alone, supernet)
        torch.testing.assert_close(supernet(images(), genotype), alone(images()))


def test_idle_parts_of_a_string_change_nothing():
    torch.manual_seed(0)
    supernet = Nasbench101Network(SPACE, **SIZE).double()
    edges = {(0, 2), (2, 6)}
    strings = [[int(pair in edges | idle) for pair in PAIRS] + [0] * 5 for idle in (set(), {(0, 1), (3, 4)})]
    outputs = [supernet(images(), SPACE.decode(string)) for string in strings]
    assert torch.equal(*outputs)


def test_recalibration_and_batch_statistics_know_the_sliced_normalisation():
    torch.manual_seed(0)
    supernet = Nasbench101Network(SPACE, **SIZE).double()
    genotype = SPACE.random_genotype(random.Random(0))
    supernet.eval()
    before = [buffer.clone() for buffer in supernet.buffers()]
    with batch_statistics(supernet):
        supernet(images(), genotype)
    changed = [not torch.equal(a, b) for a, b in zip(before, supernet.buffers(), strict=True) if a.is_floating_point()]
    assert not any(changed)
    alone = Nasbench101Network(SPACE, **SIZE, only=genotype).double()
    copy_slices(alone, supernet)
    outputs = []
    for network in (supernet, alone):
        recalibrate(network, lambda x, network=network: network(x, genotype), [(images(), None), (2 * images(), None)])
        outputs.append(network(images(), genotype))
    torch.testing.assert_close(*outputs)


def test_wrong_sizes_and_calls_are_refused():
    with pytest.raises(UserError, match="must be 3, 6, 9"):
        Nasbench101Network(SPACE, **SIZE | {"cells": 4})
    with pytest.raises(UserError, match="share a cell's channels: give that many, got 4"):
        Nasbench101Network(SPACE, **SIZE | {"channels": 4})
    with pytest.raises(UserError, match="needs an architecture"):
        Nasbench101Network(SPACE, **SIZE).double()(images())
