from fastnas.spaces import ArchitectureString, Genotype
from fastnas.spaces.agreement import edge_agreement


def genotype(*normal):
    """Cells of one node."""
    return Genotype((tuple(normal),), ((("skip_connect", 0),),), (2,), (2,))


def test_the_share_of_the_most_frequent_choice_of_each_edge():
    genotypes = [
        genotype(("sep_conv_3x3", 0), ("skip_connect", 1)),
        genotype(("sep_conv_3x3", 0), ("max_pool_3x3", 1)),
        genotype(("sep_conv_3x3", 0), ("sep_conv_5x5", 0)),
        genotype(("sep_conv_3x3", 0), ("none", 1)),
    ]
    assert edge_agreement(genotypes) == {
        "normal 0 -> node 0": 0.75,  # one has a second candidate there
        "normal 1 -> node 0": 0.5,  # two have no edge
        "reduce 0 -> node 0": 1.0,
    }


def test_places_of_strings():
    strings = [ArchitectureString("shufflenet", string) for string in ((0, 1), (0, 2), (0, 1))]
    assert edge_agreement(strings) == {"place 0": 1.0, "place 1": 2 / 3}
