import random

import pytest
import torch
import torch.nn.functional as F

from fastnas.engine.mixture import Alphas, Mixture
from fastnas.engine.supernet import Supernet
from fastnas.errors import UserError
from fastnas.nn import FactorizedReduce
from fastnas.spaces import DartsSpace


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def one_hot(space, genotype):
    """The mixture that puts weight 1 on the genotype's candidates and 0 elsewhere."""

    def cell(nodes):
        weights = torch.zeros(space.num_edges, len(space.candidates), dtype=torch.double)
        for node, pairs in enumerate(nodes):
            for name, source in pairs:
                weights[space.edge_slice(node).start + source, space.candidates.index(name)] = 1
        return weights

    return Mixture(cell(genotype.normal), cell(genotype.reduce))


@pytest.mark.parametrize(("k", "expected"), [(1, 1_930_618), (2, 671_482), (4, 299_578), (8, 178_042)])
def test_parameter_counts_of_the_papers_supernets(k, expected):
    with torch.device("meta"):
        assert parameters(Supernet(DartsSpace(), channels=16, cells=8, classes=10, k=k)) == expected


def test_layout_of_the_cells():
    supernet = Supernet(DartsSpace(), channels=8, cells=8, classes=10)
    assert [i for i, cell in enumerate(supernet.cells) if cell.reduction] == [2, 5]
    reducing_inputs = [i for i, c in enumerate(supernet.cells) if isinstance(c.preprocess0, FactorizedReduce)]
    assert reducing_inputs == [3, 6]
    assert [edge.stride for edge in supernet.cells[2].edges] == [2 if s < 2 else 1 for s in DartsSpace().sources]
    assert {edge.stride for edge in supernet.cells[1].edges} == {1}


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("size", [32, 29])
def test_logits_for_any_stem_and_size(stem, size):
    supernet = Supernet(DartsSpace(nodes=2), channels=4, cells=4, classes=7, stem=stem, in_channels=2)
    alphas = Alphas(DartsSpace(nodes=2), edge_normalisation=True)
    assert supernet(torch.randn(3, 2, size, size), alphas()).shape == (3, 7)


def test_a_sampled_path_equals_the_one_hot_mixture_and_touches_only_its_own_weights():
    space = DartsSpace()
    supernet = Supernet(space, channels=4, cells=3, classes=10).double().eval()
    genotype = space.random_genotype(random.Random(3))
    x = torch.randn(2, 3, 8, 8, dtype=torch.double)
    logits = supernet(x, genotype)
    torch.testing.assert_close(logits, supernet(x, one_hot(space, genotype)))
    logits.sum().backward()
    touched = {name for name, parameter in supernet.named_parameters() if parameter.grad is not None}
    for index, cell in enumerate(supernet.cells):
        nodes = genotype.reduce if cell.reduction else genotype.normal
        used = {
            (space.edge_slice(node).start + source, space.candidates.index(name))
            for node, pairs in enumerate(nodes)
            for name, source in pairs
        }
        for edge, mixed_op in enumerate(cell.edges):
            for candidate, operation in enumerate(mixed_op.candidates):
                for name, _ in operation.named_parameters():
                    full = f"cells.{index}.edges.{edge}.candidates.{candidate}.{name}"
                    assert (full in touched) == ((edge, candidate) in used), full


def test_edge_weights_multiply_the_edges():
    space = DartsSpace(nodes=1, candidates=("skip_connect", "none"))
    supernet = Supernet(space, channels=4, cells=1, classes=2).double().eval()
    cell = supernet.cells[0]
    s = torch.randn(1, 12, 4, 4, dtype=torch.double)
    weights, edges = torch.tensor([[1.0, 0], [1, 0]]).double(), torch.tensor([0.25, 0.75]).double()
    expected = 0.25 * cell.edges[0].candidates[0](cell.preprocess0(s))
    expected = expected + 0.75 * cell.edges[1].candidates[0](cell.preprocess1(s))
    torch.testing.assert_close(cell(s, s, Mixture(weights, weights, edges, edges)), expected)


def test_alphas_are_small_softmaxed_and_saved():
    space = DartsSpace()
    alphas = Alphas(space, edge_normalisation=True, generator=torch.Generator().manual_seed(0))
    assert set(alphas.state_dict()) == {"alpha_normal", "alpha_reduce", "beta_normal", "beta_reduce"}
    assert alphas.alpha_normal.shape == (14, 8)
    assert alphas.alpha_normal.abs().max() < 0.01
    mixture = alphas()
    torch.testing.assert_close(mixture.normal.sum(-1), torch.ones(14))
    for node in range(4):
        torch.testing.assert_close(mixture.reduce_edges[space.edge_slice(node)].sum(), torch.tensor(1.0))
    assert mixture.detach().normal.requires_grad is False
    assert Alphas(space)().normal_edges is None


def test_beta_and_alpha_both_receive_gradients():
    space = DartsSpace(nodes=2)
    supernet = Supernet(space, channels=8, cells=3, classes=4, k=4)
    alphas = Alphas(space, edge_normalisation=True)
    logits = supernet(torch.randn(2, 3, 8, 8), alphas())
    F.cross_entropy(logits, torch.tensor([0, 1])).backward()
    for name, parameter in alphas.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


def test_channels_must_allow_the_selected_share():
    with pytest.raises(UserError, match="multiple of 2k = 8"):
        Supernet(DartsSpace(), channels=12, cells=3, classes=2, k=4)
