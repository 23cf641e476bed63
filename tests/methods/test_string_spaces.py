"""Methods on spaces whose architectures are strings."""

import dataclasses

import pytest
import torch

from fastnas.errors import UserError
from fastnas.methods import Darts, Problem, Spos, WeightSettings
from fastnas.methods.darts import DartsSettings
from fastnas.methods.evolution import Limits, LimitSettings
from fastnas.methods.spos import SposSettings
from fastnas.search import resolve
from fastnas.spaces import Nasbench201Space, ShufflenetSpace


def problem(space) -> Problem:
    weights = WeightSettings(epochs=2, batch_size=4, channels=2, cells=3, lr=0.1, lr_min=0.0)
    return Problem(space, 3, 2, weights, torch.device("cpu"), seed=0, image_size=6)


@pytest.mark.parametrize("order", [1, 2])
def test_darts_takes_the_best_candidate_of_each_201_edge(batches, order):
    method = Darts(DartsSettings(order=order), problem(Nasbench201Space()))
    method.supernet.double()
    method.start_epoch(0)
    before = method.alphas.alpha_normal.detach().clone()
    method.step(0, *batches)
    assert not torch.equal(before, method.alphas.alpha_normal)
    with torch.no_grad():
        method.alphas.alpha_normal.zero_()
        method.alphas.alpha_normal[:, 1] = 1.0
        method.alphas.alpha_normal[2, 0] = 2.0
    assert method.derive().string == (1, 1, 0, 1, 1, 1)
    figures = method.end_epoch([batches[1]])
    assert figures["skips_normal"] == 5 and len(figures["edge_entropy_normal"]) == 6


def test_201_gradients_are_those_of_plain_autograd(batches):
    method = Darts(DartsSettings(), problem(Nasbench201Space()))
    method.supernet.double()
    method.alphas.double()
    _, (found, _) = method.first_order_gradient(*batches)
    loss = torch.nn.functional.cross_entropy(method.supernet(batches[1][0], method.alphas()), batches[1][1])
    torch.testing.assert_close(found, torch.autograd.grad(loss, method.alphas.alpha_normal)[0])


@pytest.mark.parametrize("space", [Nasbench201Space(), ShufflenetSpace(4)])
def test_uniform_paths_and_evolution(batches, space):
    settings = SposSettings(generations=2, population=4, parents=2, crossovers=2, mutations=1)
    method = Spos(settings, problem(space))
    method.supernet.double()
    method.start_epoch(1)
    method.step(0, *batches)
    figures = method.end_epoch([batches[1]])
    assert figures["search_accuracy"] == max(figures["top_accuracies"])
    assert method.derive() == space.decode(method.found, rule="evolution")


def test_limits_count_what_is_built():
    space = ShufflenetSpace(4)
    here = problem(space)
    small, large = space.decode((0,) * 4), space.decode((3,) * 4)
    limits = Limits(LimitSettings(max_parameters=1.0, target_channels=2), here)
    costs = [limits._count(genotype).parameters for genotype in (small, large)]
    assert costs[0] < costs[1]
    limit = dataclasses.replace(limits.settings, max_parameters=float(costs[0]))
    assert [Limits(limit, here).allow(g) for g in (small, large)] == [True, False]


def test_a_method_that_does_not_search_a_space_says_so():
    with pytest.raises(UserError, match="parsec does not search the space shufflenet: give --space darts or nasnet"):
        resolve({"method": "parsec", "space": "shufflenet"}, {})
    with pytest.raises(UserError, match="one_shot does not search the space darts: give --space choice_blocks"):
        resolve({"method": "one_shot"}, {})
