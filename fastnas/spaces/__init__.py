"""Search spaces as data: the DARTS cell, its genotypes and the rules that derive them."""

from fastnas.spaces.darts import DARTS_CANDIDATES, DartsSpace, reduction_cells
from fastnas.spaces.genotype import Genotype, load_genotype
from fastnas.spaces.published import PUBLISHED

__all__ = ["DARTS_CANDIDATES", "PUBLISHED", "DartsSpace", "Genotype", "load_genotype", "reduction_cells"]
