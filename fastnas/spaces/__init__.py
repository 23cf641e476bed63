"""Search spaces as data: cells, their genotypes and the rules that derive them. `SPACES` maps names to classes."""

from fastnas.spaces.darts import DARTS_CANDIDATES, DartsSpace, reduction_cells
from fastnas.spaces.genotype import Genotype, load_genotype
from fastnas.spaces.nasnet import NASNET_CANDIDATES, NasnetSpace
from fastnas.spaces.published import PUBLISHED

SPACES: dict[str, type[DartsSpace]] = {"darts": DartsSpace, "nasnet": NasnetSpace}

__all__ = [
    "DARTS_CANDIDATES",
    "NASNET_CANDIDATES",
    "PUBLISHED",
    "SPACES",
    "DartsSpace",
    "Genotype",
    "NasnetSpace",
    "load_genotype",
    "reduction_cells",
]
