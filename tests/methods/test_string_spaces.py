"""Methods on spaces whose architectures are strings."""

import dataclasses
import math

import pytest
import torch

from fastnas.engine.cost import nasbench201_costs
from fastnas.engine.mixture import Mixture
from fastnas.errors import UserError
from fastnas.methods import METHODS, Darts, Parsec, Problem, Snas, Spos, WeightSettings
from fastnas.methods.darts import DartsSettings
from fastnas.methods.evolution import Limits, LimitSettings
from fastnas.methods.parsec import ParsecSettings
from fastnas.methods.snas import SnasSettings
from fastnas.methods.spos import SposSettings
from fastnas.search import resolve
from fastnas.spaces import Nasbench101Space, Nasbench201Space, ShufflenetSpace
from fastnas.spaces.derive import skips_and_edges


def problem(space) -> Problem:
    weights = WeightSettings(
        epochs=2, batch_size=4, channels=2 if space.name != "nasbench101" else 5, cells=3, lr=0.1, lr_min=0.0
    )
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


def test_the_cap_on_skips_takes_the_next_candidate_of_the_weakest_201_edges():
    method = Darts(DartsSettings(max_skips=1), problem(Nasbench201Space()))
    with torch.no_grad():
        method.alphas.alpha_normal.zero_()
        method.alphas.alpha_normal[:, 1] = torch.tensor([1.0, 3.0, 2.0, 0.5, 0.7, 0.0])
        method.alphas.alpha_normal[:, 3] = 0.2
    genotype = method.derive()
    assert genotype.string == (3, 1, 3, 3, 3, 3) and genotype.rule == "argmax, at most 1 skips"
    assert skips_and_edges(Nasbench201Space().decode((1, 0, 3, 1, 2, 0)))["normal"] == (2, 4)
    assert skips_and_edges(ShufflenetSpace(4).decode((1, 1, 1, 1))) == {}


def test_201_gradients_are_those_of_plain_autograd(batches):
    method = Darts(DartsSettings(), problem(Nasbench201Space()))
    method.supernet.double()
    method.alphas.double()
    _, (found, _) = method.first_order_gradient(*batches)
    loss = torch.nn.functional.cross_entropy(method.supernet(batches[1][0], method.alphas()), batches[1][1])
    torch.testing.assert_close(found, torch.autograd.grad(loss, method.alphas.alpha_normal)[0])


SMALL = {
    "pc_darts": {"partial": 2, "warmup_epochs": 0},
    "parsec": {"samples": 2},
    "snas": {},
    "proxyless": {"warmup_epochs": 0},
    "vaenas_g": {"warmup_epochs": 0, "ranked": 2, "vae_iterations": 1, "vae_hidden": 4},
}


@pytest.mark.parametrize("name", SMALL)
def test_other_methods_search_the_201_cells(batches, name):
    space = Nasbench201Space()
    method = METHODS[name](METHODS[name].Settings(**SMALL[name]), problem(space))
    learnt = getattr(method, {"parsec": "distribution", "snas": "log_alphas"}.get(name, "alphas"))
    batches = [(x.float(), y) for x, y in batches]
    method.start_epoch(1)
    before = [parameter.detach().clone() for parameter in learnt.parameters()]
    for index in range(0, 10, 5):
        method.step(index, *batches)
    assert any(not torch.equal(old, new) for old, new in zip(before, learnt.parameters(), strict=True))
    figures = method.end_epoch([batches[1]])
    entropy = figures["entropy"] / (6 if name == "parsec" else 1)  # a sum over edges there, else their mean
    assert entropy == pytest.approx(torch.tensor(5.0).log().item(), rel=0.05)
    assert [] not in figures.values()
    genotype = method.derive()
    assert genotype == space.decode(genotype.string, rule=genotype.rule)


def test_pairs_from_the_autoencoder_name_the_path_of_the_weight_step():
    method = METHODS["vaenas_g"](METHODS["vaenas_g"].Settings(vae_hidden=4), problem(Nasbench201Space()))
    normal, reduce = method.sample_pairs(3)
    assert normal.candidates.shape == (6, 2) and reduce.candidates.shape == (0, 2)
    assert tuple(normal.candidates[:, 0].tolist()) == method.sample_path(3).string


def test_parsec_draws_each_201_edge_from_a_categorical():
    method = Parsec(ParsecSettings(samples=2), problem(Nasbench201Space()))
    distribution = method.distribution
    assert [tuple(logits.shape) for logits in distribution.logits] == [(1, 5)] * 6
    with torch.no_grad():
        for edge, best in enumerate((3, 1, 0, 4, 2, 3)):
            distribution.logits[edge][0, best] = 2.0
    assert method.derive().string == (3, 1, 0, 4, 2, 3) and method.derive().rule == "mode"
    pi = torch.tensor([2.0, 0.0, 0.0, 0.0, 0.0]).softmax(-1)
    choices = [torch.tensor([[best]]) for best in (3, 1, 0, 4, 2, 0)]  # the last edge draws another
    torch.testing.assert_close(distribution.log_prob(choices)[0], 5 * pi[0].log() + pi[1].log())
    assert distribution.entropies()[1] == 0


def test_snas_costs_of_the_201_candidates():
    """Parameters by hand: three cells of 2, 4 and 8 channels, their convolutions with affine normalisation."""
    here = problem(Nasbench201Space())
    table = nasbench201_costs(here.space, channels=2, cells=3, image_size=6)
    widths = (2, 4, 8)
    expected = [0, 0, sum(c * c + 2 * c for c in widths), sum(9 * c * c + 2 * c for c in widths), 0]
    assert table[0].tolist() == [expected] * 6
    sizes = (36, 9, 4)
    assert table[1, 0, 3] == sum(9 * c * c * area for c, area in zip(widths, sizes, strict=True))
    assert table[3, 0, 1] == sum(2 * c * area for c, area in zip(widths, sizes, strict=True))  # memory of a skip
    method = Snas(SnasSettings(), here)
    uniform = Mixture(torch.full((6, 5), 0.2), torch.zeros(0, 5))
    torch.testing.assert_close(method.cost(uniform), torch.tensor(1.0))


def test_random_channels_are_refused_in_201_cells():
    with pytest.raises(UserError, match="random-channels is for cells of the DARTS kind"):
        Darts(DartsSettings(random_channels=True, partial=2), problem(Nasbench201Space()))


@pytest.mark.parametrize("space", [Nasbench101Space(), Nasbench201Space(), ShufflenetSpace(4)])
def test_uniform_paths_and_evolution(batches, space):
    settings = SposSettings(generations=2, population=4, parents=2, crossovers=2, mutations=1)
    method = Spos(settings, problem(space))
    method.supernet.double()
    method.start_epoch(1)
    method.step(0, *batches)
    figures = method.end_epoch([batches[1]])
    assert figures["search_accuracy"] == max(figures["top_accuracies"])
    assert method.derive() == space.decode(method.found, rule="evolution")


def test_the_autoencoder_and_the_evolution_give_valid_101_cells(batches, monkeypatch):
    space = Nasbench101Space()
    settings = {"generations": 2, "population": 8, "parents": 2, "crossovers": 3, "mutations": 3, "vae_seeds": 4}
    vae = {"ranked": 4, "vae_iterations": 2, "vae_hidden": 4, "epsilon_step": 1.0}
    method = METHODS["vaenas_os"](METHODS["vaenas_os"].Settings(**settings, **vae), problem(space))
    assert all(map(space.is_valid, method.gamma(1.0, 20, 7))) and all(map(space.is_valid, method.gamma(0.0, 20, 7)))
    scored = []
    score = method.recalibrated_accuracy
    monkeypatch.setattr(method, "recalibrated_accuracy", lambda s, search: scored.append(s) or score(s, search))
    batches = [(x.float(), y) for x, y in batches]
    method.start_epoch(1)
    method.step(1, *batches)
    figures = method.end_epoch([batches[1]])
    assert len(scored) == 16 and all(map(space.is_valid, scored))
    assert figures["entropy"] == pytest.approx(math.log(293_930 * 3**5))  # 9 of 21 edges
    assert method.derive().space == "nasbench101"
    monkeypatch.setattr(method.sampler.vae, "sample", lambda count, generator: [(0,) * 26] * count)
    with pytest.raises(UserError, match="hardly any valid architecture"):
        method.seeds()


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
