"""Which network a space and a genotype are built as."""

from __future__ import annotations

from torch import nn

from fastnas.engine.choice_blocks import ChoiceBlockNetwork
from fastnas.engine.derived import DerivedNetwork
from fastnas.errors import UserError
from fastnas.spaces import AnyGenotype, ArchitectureString
from fastnas.spaces.choice_blocks import ChoiceBlockSpace


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
    if not isinstance(genotype, ArchitectureString):
        return DerivedNetwork(
            genotype,
            channels=channels,
            cells=cells,
            classes=classes,
            in_channels=in_channels,
            stem=stem,
            auxiliary=auxiliary,
        )
    if genotype.space == ChoiceBlockSpace.name:
        space = ChoiceBlockSpace(len(genotype.string) // 2)
        return ChoiceBlockNetwork(
            space, channels=channels, cells=cells, classes=classes, in_channels=in_channels, only=genotype
        )
    raise UserError(f"genotype: no network is known for the space {genotype.space!r}")
