"""Counts against hand calculations and published figures."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastnas.engine.derived import DerivedNetwork
from fastnas.profiler.counts import count
from fastnas.spaces.published import PUBLISHED


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (3, 10, 12), 10 * 12 * 8 * 3 * 9),
        (nn.Conv2d(8, 16, 5, stride=2, padding=2, groups=4), (8, 9, 9), 5 * 5 * 16 * 2 * 25),
        (nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8), (8, 6, 6), 6 * 6 * 8 * 9),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (4, 5, 5), 5 * 5 * 4 * 6 * 4),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 7)), (3, 2, 2), 84),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 7, bias=False)), (3, 2, 2), 84),
        (nn.Identity(), (3, 2, 2), 0),
    ],
)
def test_multiply_adds(module, shape, expected):
    counts = count(module, shape)
    assert counts.multiply_adds == counts.multiply_adds_all == expected
    assert counts.parameters == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("module", "kind", "expected"),
    [
        (nn.BatchNorm2d(4), "batch normalisation", 2 * 4 * 36),
        (nn.BatchNorm2d(4, affine=False), "batch normalisation", 4 * 36),
        (nn.ReLU(), "ReLU", 4 * 36),
        (nn.ReLU(inplace=True), "ReLU", 4 * 36),
        (nn.MaxPool2d(3, 2, 1), "pooling", 4 * 36),
        (nn.AvgPool2d(2), "pooling", 4 * 36),
        (nn.AdaptiveAvgPool2d(1), "pooling", 4 * 36),
        (nn.AdaptiveAvgPool2d(2), "pooling", 4 * 36),
    ],
)
def test_other_layers_count_in_the_second_figure_only(module, kind, expected):
    counts = count(module, (4, 6, 6))
    assert counts.by_kind == {kind: expected}
    assert (counts.multiply_adds, counts.multiply_adds_all) == (0, expected)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, 3, 1, 1))

    def forward(self, x):
        return F.relu(F.conv2d(x, self.weight)).mean((2, 3)) + 1


def test_functional_calls_count_like_modules():
    assert count(Functional(), (3, 4, 4)).by_kind == {"convolution": 240, "ReLU": 80, "pooling": 80}


def test_a_module_used_twice_counts_twice():
    layer = nn.Conv2d(3, 3, 1)
    counts = count(nn.Sequential(layer, layer), (3, 2, 2))
    assert (counts.multiply_adds, counts.parameters) == (2 * 36, 12)


def test_the_module_is_left_as_it_was():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).train()
    module[1].eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    count(module, (3, 8, 8))
    assert [part.training for part in module.modules()] == [True, True, False, True]
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    with pytest.raises(RuntimeError):
        count(module, (5, 8, 8))
    assert [part.training for part in module.modules()] == [True, True, False, True]


def test_half_precision_modules():
    assert count(nn.Conv2d(3, 4, 1).bfloat16(), (3, 2, 2)).multiply_adds == 48


# The second figure is published: 597 M and 586 M in the PC-DARTS paper, 544.59 M in quark0/darts issue 46.
@pytest.mark.parametrize(
    ("name", "multiply_adds", "multiply_adds_all"),
    [("PC_DARTS_image", 581.63, 597.21), ("PC_DARTS_cifar", 571.14, 586.36), ("DARTS_V2", 529.91, 544.59)],
)
def test_published_networks_at_224(name, multiply_adds, multiply_adds_all):
    network = DerivedNetwork(PUBLISHED[name], channels=48, cells=14, classes=1000, stem="imagenet")
    counts = count(network, (3, 224, 224))
    assert counts.multiply_adds / 1e6 == pytest.approx(multiply_adds, abs=0.005)
    assert counts.multiply_adds_all / 1e6 == pytest.approx(multiply_adds_all, abs=0.01)
    assert "ptflops" in counts.convention
