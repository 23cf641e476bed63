import random

import pytest
import torch

from fastnas.engine.cost import Cost, NetworkCost, candidate_cost
from fastnas.engine.derived import DerivedNetwork
from fastnas.profiler.counts import count
from fastnas.spaces import DartsSpace, NasnetSpace
from fastnas.spaces.genotype import live_edges


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("none", Cost()),
        ("skip_connect", Cost(0, 0, 0, 64 * 8)),
        ("max_pool_3x3", Cost(0, 0, 64 * 9 * 4, 64 * 8)),
        ("avg_pool_3x3", Cost(0, 0, 64 * 9 * 4, 64 * 8)),
        ("dil_conv_3x3", Cost(36 + 16 + 8, 64 * 52, 64 * 52, 2 * 64 * 8 + 52)),
        ("sep_conv_3x3", Cost(120, 2 * 64 * 52, 2 * 64 * 52, 4 * 64 * 8 + 104)),
    ],
)
def test_cost_of_a_candidate_by_the_papers_formulas(name, expected):
    assert candidate_cost(name, 4, 1, 8) == expected  # 4 channels, 8x8


def test_strided_candidates_are_counted_at_their_output_size():
    assert candidate_cost("max_pool_3x3", 4, 2, 9) == Cost(0, 0, 25 * 9 * 4, 25 * 8)


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
@pytest.mark.parametrize("space", [DartsSpace(nodes=3), NasnetSpace(nodes=2)])
def test_sums_equal_the_counts_of_the_built_network(space, stem):
    setting = {"channels": 4, "cells": 5, "classes": 7, "stem": stem}
    costs = NetworkCost(space, image_size=37, **setting)
    whole = 0
    for seed in range(8):
        genotype = space.random_genotype(random.Random(seed))
        with torch.device("meta"):
            counts = count(DerivedNetwork(genotype, **setting), (3, 37, 37))
        cost = costs.of(genotype)
        read = [{s for node in live_edges(nodes) for _, s in node} for nodes in (genotype.normal, genotype.reduce)]
        if all(map(all, map(live_edges, (genotype.normal, genotype.reduce)))) and all({0, 1} <= r for r in read):
            whole += 1
            assert (cost.parameters, cost.multiply_adds) == (counts.parameters, counts.multiply_adds)
        else:  # something around the edges is gone too
            assert cost.parameters > counts.parameters and cost.multiply_adds > counts.multiply_adds
    assert whole >= 4
