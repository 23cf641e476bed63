import torch

from fastnas.spaces import DartsSpace
from fastnas.spaces.derive import derive_all_edges, derive_top2

SPACE = DartsSpace(nodes=2, candidates=("none", "skip_connect", "sep_conv_3x3"))


def test_none_takes_part_in_nothing_even_when_it_is_strongest():
    weights = torch.tensor([[0.9, 0.06, 0.04], [0.9, 0.01, 0.09], [0.2, 0.5, 0.3], [0.9, 0.1, 0.0], [0.1, 0.2, 0.7]])
    genotype = derive_top2(SPACE, weights, weights)
    assert genotype.normal == (
        (("skip_connect", 0), ("sep_conv_3x3", 1)),
        (("skip_connect", 0), ("sep_conv_3x3", 2)),
    )
    assert genotype.reduce == genotype.normal
    assert genotype.normal_concat == (2, 3)
    assert genotype.rule == "top2"


def test_edge_weights_change_which_edges_stay_but_not_their_candidates():
    weights = torch.tensor([[0.0, 1.0, 0.0]] * 2 + [[0.0, 0.9, 0.1], [0.0, 0.8, 0.2], [0.0, 0.3, 0.7]])
    edges = torch.tensor([0.5, 0.5, 0.1, 0.3, 0.6])
    genotype = derive_top2(SPACE, weights, weights, edges, edges)
    assert genotype.normal[1] == (("skip_connect", 1), ("sep_conv_3x3", 2))
    assert genotype.rule == "top2-edge-normalised"
    assert derive_top2(SPACE, weights, weights).normal[1] == (("skip_connect", 0), ("skip_connect", 1))


def test_ties_go_to_the_earlier_edge_and_candidate():
    genotype = derive_top2(SPACE, torch.full((5, 3), 1 / 3), torch.full((5, 3), 1 / 3))
    assert genotype.normal[1] == (("skip_connect", 0), ("skip_connect", 1))


def test_all_edges_keeps_every_edge_and_none():
    space = DartsSpace(nodes=2)
    weights = torch.zeros(5, 8)
    weights[1, 0] = weights[2, 4] = weights[4, 3] = 1.0
    genotype = derive_all_edges(space, weights, weights)
    assert genotype.normal == (
        (("none", 0), ("none", 1)),
        (("sep_conv_3x3", 0), ("none", 1), ("skip_connect", 2)),
    )
    assert genotype.rule == "all-edges"
