import random
from collections import Counter

import pytest

from fastnas.errors import UserError
from fastnas.spaces import DartsSpace, reduction_cells


def test_edges_are_numbered_node_by_node():
    space = DartsSpace()
    assert [(s.start, s.stop) for s in map(space.edge_slice, range(4))] == [(0, 2), (2, 5), (5, 9), (9, 14)]
    assert space.num_edges == 14
    assert space.sources == (0, 1, 0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4)


def test_reduction_cells_are_at_a_third_and_two_thirds():
    assert reduction_cells(8) == (2, 5)
    assert reduction_cells(20) == (6, 13)
    assert reduction_cells(14) == (4, 9)


def test_random_genotypes_cover_the_space_without_none_and_with_distinct_inputs():
    space, rng = DartsSpace(), random.Random(0)
    seen = Counter()
    for _ in range(300):
        for node, pairs in enumerate(space.random_genotype(rng).normal):
            assert len({source for _, source in pairs}) == 2
            assert all(source < 2 + node for _, source in pairs)
            seen.update(name for name, _ in pairs)
    assert set(seen) == set(space.candidates_without_none)
    assert max(seen.values()) < 1.3 * min(seen.values())


def test_bad_spaces_are_refused():
    with pytest.raises(UserError, match="unknown candidate 'conv_9'"):
        DartsSpace(candidates=("none", "conv_9"))
    with pytest.raises(UserError, match="nodes=0"):
        DartsSpace(nodes=0)
    with pytest.raises(UserError, match="distinct"):
        DartsSpace(candidates=("none",))
