"""Search spaces as data: their architectures and the rules that derive them. `SPACES` maps names to classes."""

from fastnas.spaces.architecture import ArchitectureString
from fastnas.spaces.choice_blocks import ChoiceBlockSpace
from fastnas.spaces.darts import DARTS_CANDIDATES, DartsSpace, reduction_cells
from fastnas.spaces.genotype import Genotype, load_genotype
from fastnas.spaces.nasnet import NASNET_CANDIDATES, NasnetSpace
from fastnas.spaces.published import PUBLISHED

AnySpace = DartsSpace | ChoiceBlockSpace
AnyGenotype = Genotype | ArchitectureString

SPACES: dict[str, type[AnySpace]] = {
    "darts": DartsSpace,
    "nasnet": NasnetSpace,
    "choice_blocks": ChoiceBlockSpace,
}
CELL_SPACES = ("darts", "nasnet")  # normal and reduction cells with one candidate an edge


def build_space(name: str, *, nodes: int, cells: int) -> AnySpace:
    """The space `name` in the sizes of a search: `nodes` of a cell (or its choice blocks)."""
    if name == ChoiceBlockSpace.name:
        return ChoiceBlockSpace(nodes)
    return SPACES[name](nodes=nodes)


__all__ = [
    "CELL_SPACES",
    "DARTS_CANDIDATES",
    "NASNET_CANDIDATES",
    "PUBLISHED",
    "SPACES",
    "AnyGenotype",
    "AnySpace",
    "ArchitectureString",
    "ChoiceBlockSpace",
    "DartsSpace",
    "Genotype",
    "NasnetSpace",
    "build_space",
    "load_genotype",
    "reduction_cells",
]
