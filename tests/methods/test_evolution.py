import dataclasses
import random

import pytest
import torch

from fastnas.engine.derived import DerivedNetwork
from fastnas.errors import UserError
from fastnas.methods.evolution import EvolutionSettings, Limits, evolve
from fastnas.profiler.counts import count
from fastnas.spaces import NasnetSpace
from fastnas.spaces.strings import FreeStrings

STRINGS = FreeStrings((4,) * 10)


def everything(string):
    return True


def test_it_climbs_to_the_best_string_and_scores_none_twice():
    scored = []

    def score(string):
        scored.append(string)
        return sum(string) / 30

    top = evolve(STRINGS, score, everything, EvolutionSettings(), random.Random(0))
    assert len(scored) == len(set(scored)) == 20 * 50
    assert top[0] == ((3,) * 10, 1.0)
    assert [value for _, value in top] == sorted((value for _, value in top), reverse=True) and len(top) == 10
    chance = max(sum(STRINGS.random_string(random.Random(seed))) / 30 for seed in range(1000))
    assert chance < 0.95


def test_sizes_of_the_populations():
    calls = []
    settings = EvolutionSettings(generations=3, population=7, parents=2, crossovers=3, mutations=3)
    evolve(STRINGS, lambda string: calls.append(string) or 0.0, everything, settings, random.Random(0))
    assert len(calls) == 21


def test_the_limit_holds_for_every_string_that_is_scored():
    scored = []
    settings = EvolutionSettings(generations=5, population=10, crossovers=5, mutations=5)
    evolve(
        STRINGS,
        lambda string: scored.append(string) or sum(string),
        lambda string: sum(string) <= 12,
        settings,
        random.Random(1),
    )
    assert max(map(sum, scored)) <= 12


def test_seeds_are_in_the_first_population_if_they_fit():
    scored = []
    settings = EvolutionSettings(generations=1, population=4, crossovers=0, mutations=0)
    seeds = [(3,) * 10, (0,) * 10, (1,) * 10]
    evolve(STRINGS, lambda s: scored.append(s) or 0.0, lambda s: sum(s) <= 12, settings, random.Random(0), seeds=seeds)
    assert scored[:2] == seeds[1:] and len(scored) == 4 and seeds[0] not in scored


def test_mutation_and_crossover_take_places_from_where_they_should():
    rng = random.Random(0)
    changed = [STRINGS.mutate((0,) * 10, 0.1, rng) for _ in range(2000)]
    share = sum(place != 0 for string in changed for place in string) / 20_000
    assert share == pytest.approx(0.1 * 3 / 4, abs=0.01)  # one of four draws gives the old value again
    child = [STRINGS.cross((0,) * 10, (1,) * 10, rng) for _ in range(1000)]
    assert sum(map(sum, child)) / 10_000 == pytest.approx(0.5, abs=0.03)


def test_a_limit_out_of_reach_is_an_error():
    settings = EvolutionSettings(generations=1, population=2, crossovers=0, mutations=0)
    with pytest.raises(UserError, match="2000 random architectures were all too large"):
        evolve(STRINGS, lambda s: 0.0, lambda s: False, settings, random.Random(0))


def test_crossovers_and_mutations_must_fit_into_the_population():
    with pytest.raises(UserError, match="fill at most the population of 10, got 8"):
        EvolutionSettings(population=10, crossovers=8, mutations=8)


@pytest.mark.parametrize("field", ["max_parameters", "max_multiply_adds"])
def test_limits_bind_the_network_that_is_built(problem, field):
    space = NasnetSpace(nodes=2)
    problem = dataclasses.replace(problem, space=space, image_size=16)
    limit = {"max_parameters": 23_000, "max_multiply_adds": 1_050_000}[field]
    limits = Limits(EvolutionSettings(**{field: limit}, target_channels=8, target_cells=4), problem)
    kept = 0
    for seed in range(12):
        genotype = space.random_genotype(random.Random(seed))
        with torch.device("meta"):
            network = DerivedNetwork(genotype, channels=8, cells=4, classes=3, in_channels=2)
        size = getattr(count(network, (2, 16, 16)), field.removeprefix("max_"))
        if limits.allow(genotype):
            kept += 1
            assert size <= limit
    assert 0 < kept < 12
    assert Limits(EvolutionSettings(), problem).allow(genotype)
