import math
import random

from fastnas.spaces import DartsSpace, Genotype, NasnetSpace
from fastnas.spaces.genotype import live_edges


def test_the_papers_space_has_14_free_edges_a_cell_and_8_to_the_28_architectures():
    space = NasnetSpace()
    assert space.num_edges == 14
    assert math.prod(space.choices) == 8**28
    assert {"none", "sep_conv_7x7"} <= set(space.candidates) and "dil_conv_5x5" not in space.candidates


def test_a_string_names_the_candidate_of_each_edge():
    space = NasnetSpace(nodes=2)
    genotype = space.decode([0, 1, 2, 3, 4, 5, 6, 7, 0, 1])
    assert genotype.normal == (
        (("none", 0), ("avg_pool_3x3", 1)),
        (("max_pool_3x3", 0), ("skip_connect", 1), ("sep_conv_3x3", 2)),
    )
    assert genotype.reduce[1][2] == ("avg_pool_3x3", 2)
    assert Genotype.from_darts(genotype.to_darts()).normal == genotype.normal


def test_random_genotypes_use_every_candidate_on_every_edge():
    space, rng = NasnetSpace(nodes=2), random.Random(0)
    seen = {(source, name) for _ in range(200) for name, source in space.random_genotype(rng).normal[1]}
    assert len(seen) == 3 * 8


def test_a_string_of_the_darts_space_names_two_inputs_and_two_candidates_a_node():
    space = DartsSpace(nodes=2)
    assert space.choices == (1, 7, 7, 3, 7, 7) * 2
    genotype = space.decode([0, 0, 6, 2, 3, 3] + [0] * 6)
    assert genotype.normal == (
        (("max_pool_3x3", 0), ("dil_conv_5x5", 1)),
        (("sep_conv_3x3", 1), ("sep_conv_3x3", 2)),
    )
    assert genotype.reduce[1] == (("max_pool_3x3", 0), ("max_pool_3x3", 1))


def test_live_edges_leave_out_none_and_what_hangs_on_a_dead_node():
    nodes = (
        (("none", 0), ("none", 1)),
        (("skip_connect", 2), ("sep_conv_3x3", 1)),
        (("skip_connect", 2), ("skip_connect", 3)),
    )
    assert live_edges(nodes) == ((), (("sep_conv_3x3", 1),), (("skip_connect", 3),))
