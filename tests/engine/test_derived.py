import pytest
import torch

from fastnas.engine.derived import DerivedNetwork
from fastnas.errors import UserError
from fastnas.nn import DropPath
from fastnas.spaces import PUBLISHED


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "channels", "cells", "stem", "classes", "expected"),
    [
        ("DARTS_V2", 36, 20, "cifar", 10, 3_349_342),  # 3.3 M in the paper
        ("PC_DARTS_cifar", 36, 20, "cifar", 10, 3_634_678),  # 3.6 M
        ("PC_DARTS_image", 48, 14, "imagenet", 1000, 5_342_464),  # 5.3 M
    ],
)
def test_parameter_counts_of_published_genotypes(name, channels, cells, stem, classes, expected):
    with torch.device("meta"):
        network = DerivedNetwork(PUBLISHED[name], channels=channels, cells=cells, classes=classes, stem=stem)
    assert parameters(network) == expected


@pytest.mark.parametrize(("stem", "size"), [("cifar", 32), ("cifar", 8), ("cifar", 28), ("imagenet", 64)])
def test_auxiliary_head_runs_in_training_only(stem, size):
    network = DerivedNetwork(PUBLISHED["DARTS_V1"], channels=4, cells=5, classes=6, stem=stem, auxiliary=True)
    x = torch.randn(2, 3, size, size)
    logits, auxiliary = network.forward_with_auxiliary(x)
    assert logits.shape == auxiliary.shape == (2, 6)
    network.eval()
    logits, auxiliary = network.forward_with_auxiliary(x)
    assert auxiliary is None
    assert network(x).shape == (2, 6)


def test_auxiliary_head_has_the_papers_shape_on_cifar():
    network = DerivedNetwork(PUBLISHED["DARTS_V2"], channels=4, cells=5, classes=10, auxiliary=True)
    plain = DerivedNetwork(PUBLISHED["DARTS_V2"], channels=4, cells=5, classes=10)
    channels = 4 * 4 * 4  # four nodes of 4 channels, doubled twice
    head = channels * 128 + 2 * 128 + 128 * 768 * 4 + 2 * 768 + 768 * 10 + 10
    assert parameters(network) - parameters(plain) == head


def test_drop_path_drops_whole_samples_but_never_an_identity():
    network = DerivedNetwork(PUBLISHED["DARTS_V2"], channels=4, cells=3, classes=2)
    normal = network.cells[0]
    kinds = [[type(path).__name__ for path in node] for node in normal.nodes]
    assert kinds[2] == ["Sequential", "Identity"]
    reduction = network.cells[1]  # its skip on a cell input is a FactorizedReduce, which is dropped
    assert isinstance(reduction.nodes[0][0][-1], DropPath)
    network.set_drop_path(0.5)
    assert {m.rate for m in network.modules() if isinstance(m, DropPath)} == {0.5}
    torch.manual_seed(0)
    x = torch.ones(64, 1, 1, 1)
    drop = DropPath(0.5)
    assert set(drop(x).flatten().tolist()) == {0.0, 2.0}
    assert drop.eval()(x) is x


def test_a_derived_network_exports_without_custom_ops():
    network = DerivedNetwork(PUBLISHED["PC_DARTS_cifar"], channels=4, cells=3, classes=2).eval()
    network.set_drop_path(0.2)
    exported = torch.export.export(network, (torch.randn(1, 3, 16, 16),))
    assert not [node for node in exported.graph.nodes if "fastnas" in str(node.target)]


def test_odd_channels_are_refused():
    with pytest.raises(UserError, match="even number"):
        DerivedNetwork(PUBLISHED["DARTS_V2"], channels=5, cells=3, classes=2)
