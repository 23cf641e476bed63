import operator
from functools import reduce

import pytest
import torch

from fastnas.engine.mixture import Alphas, Mixture
from fastnas.engine.nasbench201 import Nasbench201Cell, Nasbench201Network
from fastnas.errors import UserError
from fastnas.spaces import Nasbench201Space

SPACE = Nasbench201Space()
SIZE = {"channels": 2, "cells": 3, "classes": 3, "in_channels": 1}


def images():
    return torch.randn(4, 1, 8, 8, dtype=torch.double, generator=torch.Generator().manual_seed(1))


def test_a_cell_is_the_weighted_sum_of_every_candidate_of_every_edge():
    torch.manual_seed(0)
    cell = Nasbench201Cell(SPACE, 3, [tuple(range(5))] * 6, affine=False).double()
    weights, x = torch.rand(6, 5, dtype=torch.double), torch.randn(2, 3, 6, 6, dtype=torch.double)
    states = [x]
    for target in (1, 2, 3):
        total = 0.0
        for source in range(target):
            edge = target * (target - 1) // 2 + source
            total = total + sum(weights[edge, o] * cell.edges[edge][str(o)](states[source]) for o in range(1, 5))
        states.append(total)
    torch.testing.assert_close(cell(x, Mixture(weights, weights[:0])), states[-1])


def test_a_one_hot_mixture_is_the_path():
    torch.manual_seed(0)
    network = Nasbench201Network(SPACE, **SIZE).double()
    string = (3, 1, 2, 4, 0, 3)
    weights = torch.zeros(6, 5, dtype=torch.double)
    weights[range(6), string] = 1.0
    torch.testing.assert_close(
        network(images(), Mixture(weights, weights[:0])), network(images(), SPACE.decode(string))
    )


def test_only_the_active_candidates_of_a_mixture_are_run():
    torch.manual_seed(0)
    cell = Nasbench201Cell(SPACE, 3, [tuple(range(5))] * 6, affine=False).double()
    calls = []
    for edge, candidates in enumerate(cell.edges):
        for index, module in candidates.items():
            module.register_forward_hook(lambda *_, place=(edge, int(index)): calls.append(place))
    active = [[0, 3], [1, 2], [0, 0], [4, 1], [2, 3], [0, 4]]
    weights, x = torch.zeros(6, 5, dtype=torch.double), torch.randn(2, 3, 4, 4, dtype=torch.double)
    for row, two in zip(weights, active, strict=True):
        row[two] = torch.rand(2, dtype=torch.double)
    found = cell(x, Mixture(weights, weights[:0], normal_active=active))
    assert calls == [(edge, index) for edge, two in enumerate(active) for index in two if index]
    torch.testing.assert_close(found, cell(x, Mixture(weights, weights[:0])))


def test_partial_channels_and_edge_weights():
    """PC-DARTS, eq. 1 and 2: half of the channels pass the candidates, and all are shuffled in two groups."""
    torch.manual_seed(0)
    cell = Nasbench201Cell(SPACE, 4, [tuple(range(5))] * 6, affine=False, k=2).double()
    weights, beta = torch.rand(6, 5, dtype=torch.double), torch.rand(6, dtype=torch.double)
    x = torch.randn(2, 4, 5, 5, dtype=torch.double)
    states, edge = [x], 0
    for target in (1, 2, 3):
        total = 0.0
        for source in states[:target]:
            mixed = sum(weights[edge, o] * cell.edges[edge][str(o)](source[:, :2]) for o in range(1, 5))
            joined = torch.stack([mixed, source[:, 2:]], dim=2).flatten(1, 2)  # c0, b0, c1, b1
            total = total + beta[edge] * joined
            edge += 1
        states.append(total)
    torch.testing.assert_close(cell(x, Mixture(weights, weights[:0], normal_edges=beta)), states[-1])


def test_the_skip_cell_passes_its_input_four_times():
    cell = Nasbench201Cell(SPACE, 2, [(1,)] * 6, affine=True)
    x = torch.randn(1, 2, 4, 4)
    torch.testing.assert_close(cell(x, (1,) * 6), 4 * x)
    assert reduce(operator.add, [p.numel() for p in cell.parameters()], 0) == 0


def test_no_reduction_cell_is_searched():
    mixture = Alphas(SPACE)()
    assert mixture.normal.shape == (6, 5) and mixture.reduce.shape == (0, 5)
    torch.testing.assert_close(mixture.normal.sum(-1), torch.ones(6))


def test_wrong_sizes_and_calls_are_refused():
    with pytest.raises(UserError, match="must be 3, 6, 9"):
        Nasbench201Network(SPACE, **SIZE | {"cells": 4})
    with pytest.raises(UserError, match="multiple of 4"):
        Nasbench201Network(SPACE, **SIZE, k=4)
    with pytest.raises(UserError, match="needs an architecture"):
        Nasbench201Network(SPACE, **SIZE).double()(images())
