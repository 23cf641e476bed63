"""A candidate operation and a cell space of one's own, searched with DARTS on the embedded digits."""

import sys

from torch import nn

import fastnas
from fastnas.spaces import DartsSpace


@fastnas.register_candidate("conv_3x3")
def conv_3x3(channels: int, stride: int, searching: bool) -> nn.Module:
    """[B, C, H, W] -> [B, C, ceil(H / stride), ceil(W / stride)]; no affine normalisation while searching."""
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(channels, affine=not searching),
    )


@fastnas.register_space("plain_convolutions")
def plain_convolutions(nodes: int) -> DartsSpace:
    return DartsSpace(nodes, candidates=("none", "skip_connect", "max_pool_3x3", "conv_3x3", "sep_conv_3x3"))


def main(out: str, epochs: int = 2) -> None:
    size = {"nodes": 2, "channels": 8, "cells": 3}
    found = fastnas.search_network(out, method="darts", space="plain_convolutions", epochs=epochs, **size)
    print(found.genotype.notation())


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/own_space")
