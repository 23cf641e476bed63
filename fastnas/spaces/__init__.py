"""Search spaces as data: their architectures and the rules that derive them.

`SPACES` maps names to what builds them; `CELL_SPACES` names those of the DARTS kind, with normal and reduction cells
and one candidate an edge. `register_space` adds to both.
"""

from collections.abc import Callable

from fastnas.spaces.architecture import ArchitectureString
from fastnas.spaces.choice_blocks import ChoiceBlockSpace
from fastnas.spaces.darts import DARTS_CANDIDATES, DartsSpace, reduction_cells
from fastnas.spaces.genotype import Genotype, load_genotype
from fastnas.spaces.nasbench101 import Nasbench101Space
from fastnas.spaces.nasbench201 import Nasbench201Space
from fastnas.spaces.nasnet import NASNET_CANDIDATES, NasnetSpace
from fastnas.spaces.published import PUBLISHED
from fastnas.spaces.shufflenet import ShufflenetSpace
from fastnas.spaces.strings import FreeStrings, Strings

AnySpace = DartsSpace | ChoiceBlockSpace | Nasbench101Space | Nasbench201Space | ShufflenetSpace
AnyGenotype = Genotype | ArchitectureString

SPACES: dict[str, Callable[..., AnySpace]] = {
    "darts": DartsSpace,
    "nasnet": NasnetSpace,
    "choice_blocks": ChoiceBlockSpace,
    "nasbench101": Nasbench101Space,
    "nasbench201": Nasbench201Space,
    "shufflenet": ShufflenetSpace,
    "shufflenet_se": ShufflenetSpace,
}
CELL_SPACES = ["darts", "nasnet"]

SpaceFactory = Callable[[int], DartsSpace]


def register_space(name: str) -> Callable[[SpaceFactory], SpaceFactory]:
    """Register a space of cells of your own under `name`, so that searches take it by that name.

    The decorated factory takes `nodes`, the intermediate nodes of a cell, and returns a `DartsSpace` with candidates of
    your choice, or an instance of your own subclass. Raises ValueError if the name is taken.
    """

    def register(factory: SpaceFactory) -> SpaceFactory:
        if name in SPACES:
            raise ValueError(f"space {name!r} is already registered; choose another name")
        SPACES[name] = factory
        CELL_SPACES.append(name)
        return factory

    return register


def build_space(name: str, *, nodes: int, cells: int) -> AnySpace:
    """The space `name` in the sizes of a search: `nodes` of a cell (or its choice blocks), `cells` (or layers).

    Raises UserError for sizes that it does not come in.
    """
    if name == ChoiceBlockSpace.name:
        return ChoiceBlockSpace(nodes)
    if name in (Nasbench101Space.name, Nasbench201Space.name):
        return SPACES[name]()
    if name.startswith(ShufflenetSpace.name):
        return ShufflenetSpace(cells, extras=name == "shufflenet_se")
    return SPACES[name](nodes)


def strings_of(space: AnySpace) -> Strings:
    """How to move through the strings of a space: all are valid, but in NAS-Bench-101."""
    return space if isinstance(space, Nasbench101Space) else FreeStrings(space.choices)


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
    "Nasbench101Space",
    "Nasbench201Space",
    "NasnetSpace",
    "ShufflenetSpace",
    "build_space",
    "load_genotype",
    "reduction_cells",
    "register_space",
    "strings_of",
]
