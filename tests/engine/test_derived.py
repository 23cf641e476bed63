import pytest
import torch

from fastnas.engine.derived import DerivedCell, DerivedNetwork
from fastnas.engine.supernet import Supernet
from fastnas.errors import UserError
from fastnas.nn import DropPath
from fastnas.spaces import PUBLISHED, DartsSpace, Genotype


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


def all_edges(normal, reduce="ssssss"):
    """Two nodes, all five edges; s: skip, n: none."""
    names = {"s": "skip_connect", "n": "none", "c": "sep_conv_3x3"}

    def cell(text):
        pairs = [(names[letter], source) for letter, source in zip(text, (0, 1, 0, 1, 2), strict=False)]
        return (tuple(pairs[:2]), tuple(pairs[2:]))

    return Genotype(cell(normal), cell(reduce), (2, 3), (2, 3))


def test_free_edges_and_dropped_edges_equal_the_sum_without_them():
    torch.manual_seed(0)
    network = DerivedNetwork(all_edges("scnsc"), channels=4, cells=3, classes=3)
    cell = network.cells[0]
    assert cell.sources == [[0, 1], [1, 2]]
    s0, s1 = torch.randn(2, 2, 12, 8, 8)
    cell.eval()
    a, b = cell.preprocess0(s0), cell.preprocess1(s1)
    first = a + cell.nodes[0][1](b)
    second = b + cell.nodes[1][1](first)
    torch.testing.assert_close(cell(s0, s1), torch.cat([first, second], 1))


def test_a_node_without_inputs_goes_with_all_that_hangs_on_it():
    """Node 0 has no input: its edge to node 1 and its channels of the output go, and so does input 0."""
    network = DerivedNetwork(all_edges("nnncc"), channels=4, cells=4, classes=3)
    cell = network.cells[0]
    assert cell.sources == [[], [1]]
    assert cell.preprocess0 is None and cell.out_channels == 4
    assert network.cells[1].preprocess1[1].in_channels == 4
    network(torch.randn(2, 3, 8, 8)).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_dropping_a_node_changes_nothing_but_the_zeros_that_it_gave():
    """The shared weights' child, which keeps zeros in the place of a dropped node, computes the same."""
    space = DartsSpace(nodes=2, candidates=("none", "skip_connect", "sep_conv_3x3"))
    genotype = all_edges("nnncc")
    supernet = Supernet(space, channels=4, cells=3, classes=3).double()
    network = DerivedCell(genotype.normal, (2, 3), 12, 12, 4, reduction=False, previous_reduces=False).double()
    ours, theirs = network, supernet.cells[0]
    ours.preprocess1[1].weight.data.copy_(theirs.preprocess1[1].weight)
    for mine, shared in zip(ours.nodes[1][0][0].parameters(), _affine(theirs.edges[3].candidates[2]), strict=True):
        mine.data.copy_(shared)
    s = torch.randn(2, 12, 8, 8, dtype=torch.double)
    zeros_and_node = theirs.forward_path(s, s, genotype.normal)
    assert (zeros_and_node[:, :4] == 0).all()
    torch.testing.assert_close(zeros_and_node[:, 4:], ours(s, s))


def _affine(candidate):
    """Parameters of a candidate of the supernet, with the 1 and 0 of an affine normalisation."""
    for layer in candidate:
        if isinstance(layer, torch.nn.Conv2d):
            yield layer.weight
        if isinstance(layer, torch.nn.BatchNorm2d):
            yield torch.ones(layer.num_features)
            yield torch.zeros(layer.num_features)


def test_a_cell_of_which_nothing_is_left_is_refused():
    with pytest.raises(UserError, match="every path of the normal cell ends in 'none'"):
        DerivedNetwork(all_edges("nnnns"), channels=4, cells=3, classes=3)
