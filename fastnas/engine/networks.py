"""Which networks a space and a genotype are built as."""

from __future__ import annotations

from torch import nn

from fastnas.engine.choice_blocks import GHOST, ChoiceBlockNetwork
from fastnas.engine.derived import DerivedNetwork
from fastnas.engine.nasbench101 import Nasbench101Network
from fastnas.engine.nasbench201 import Nasbench201Network
from fastnas.engine.shufflenet import ShufflenetNetwork
from fastnas.engine.supernet import Supernet
from fastnas.errors import UserError
from fastnas.spaces import AnyGenotype, AnySpace, ArchitectureString
from fastnas.spaces.choice_blocks import ChoiceBlockSpace
from fastnas.spaces.darts import DartsSpace
from fastnas.spaces.nasbench101 import Nasbench101Space
from fastnas.spaces.nasbench201 import Nasbench201Space
from fastnas.spaces.shufflenet import ShufflenetSpace


def build_supernet(
    space: AnySpace,
    *,
    channels: int,
    cells: int,
    classes: int,
    in_channels: int = 3,
    k: int = 1,
    stem: str = "cifar",
    executor: str = "plain",
    storage: str = "float32",
    ghost: int = GHOST,
    auxiliary: bool = False,
) -> nn.Module:
    """The network that holds all choices of a space; called with images and an architecture it gives logits.

    `k`: partial channels 1/K, for cells. `executor`, `storage`, `auxiliary`: as `Supernet` takes them, for cells of the
    DARTS kind. `ghost`: images of a ghost batch, for choice blocks. Raises UserError for what a space does not have.
    """
    size = {"channels": channels, "cells": cells, "classes": classes, "in_channels": in_channels}
    if isinstance(space, DartsSpace):
        return Supernet(space, **size, k=k, stem=stem, executor=executor, storage=storage, auxiliary=auxiliary)
    if storage != "float32":
        raise UserError(f"the space {space.name} has no storage {storage}: leave out --storage")
    if auxiliary:
        raise UserError(f"the space {space.name} has no auxiliary head: leave --auxiliary-weight at 0")
    if isinstance(space, Nasbench201Space) and stem == "cifar":
        return Nasbench201Network(space, **size, k=k)
    if k != 1:
        raise UserError(f"the space {space.name} has no partial channels: leave --partial at 1")
    return _of_strings(space, None, stem, size, ghost)


def build_network(
    genotype: AnyGenotype,
    *,
    channels: int,
    cells: int,
    classes: int,
    in_channels: int = 3,
    stem: str = "cifar",
    auxiliary: bool = False,
) -> nn.Module:
    """The network of a genotype for training from scratch: images [B, in_channels, H, W] -> logits [B, classes].

    `channels`, `cells`: as in the space's supernet. `auxiliary`: with an auxiliary head, where the network has one
    (`DerivedNetwork`). Raises UserError for a genotype that cannot be built.
    """
    size = {"channels": channels, "cells": cells, "classes": classes, "in_channels": in_channels}
    if not isinstance(genotype, ArchitectureString):
        return DerivedNetwork(genotype, **size, stem=stem, auxiliary=auxiliary)
    return _of_strings(space_of(genotype), genotype, stem, size, GHOST)


def space_of(genotype: ArchitectureString) -> AnySpace:
    """The space that a genotype is from. Raises UserError for an unknown one and for a string that is not of it."""
    length = len(genotype.string)
    spaces = {
        "choice_blocks": lambda: ChoiceBlockSpace(length // 2),
        "nasbench101": Nasbench101Space,
        "nasbench201": Nasbench201Space,
        "shufflenet": lambda: ShufflenetSpace(length),
        "shufflenet_se": lambda: ShufflenetSpace(length, extras=True),
    }
    if genotype.space not in spaces:
        raise UserError(f"genotype: no network is known for the space {genotype.space!r}")
    space = spaces[genotype.space]()
    space.decode(genotype.string)
    return space


def _of_strings(
    space: AnySpace, only: ArchitectureString | None, stem: str, size: dict[str, int], ghost: int
) -> nn.Module:
    if isinstance(space, ShufflenetSpace):
        without_cells = {name: value for name, value in size.items() if name != "cells"}
        return ShufflenetNetwork(space, **without_cells, stem=stem, only=only)
    if stem != "cifar":
        raise UserError(f"the space {space.name} has no stem {stem}: leave --stem at cifar")
    if isinstance(space, ChoiceBlockSpace):
        return ChoiceBlockNetwork(space, **size, ghost=ghost, only=only)
    if isinstance(space, Nasbench101Space):
        return Nasbench101Network(space, **size, only=only)
    return Nasbench201Network(space, **size, only=only)
