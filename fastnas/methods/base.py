"""What a search method is to the search loop."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fastnas.config import option
from fastnas.engine.stems import STEMS
from fastnas.engine.training import Batch
from fastnas.errors import UserError
from fastnas.spaces.darts import DartsSpace
from fastnas.spaces.genotype import Genotype


@dataclass(frozen=True)
class WeightSettings:
    """How the network is built and its weights are trained; the defaults are those of DARTS on CIFAR-10."""

    epochs: int = option(50, "passes over the training half of the data", minimum=1)
    batch_size: int = option(64, "images a step; auto: the largest batch that fits", minimum=2)
    channels: int = option(16, "channels of the first cells' nodes; doubled at each reduction cell", minimum=2)
    cells: int = option(8, "cells of the network that searches; with fewer than 3 there is no normal cell", minimum=3)
    nodes: int = option(4, "intermediate nodes of a cell", minimum=2, maximum=16)
    stem: str = option("cifar", "layers before the first cell: full size, or three strides of 2", choices=STEMS)
    lr: float = option(0.025, "learning rate of the weights at the start", above=0)
    lr_min: float = option(0.001, "learning rate that the cosine schedule ends at", minimum=0)
    momentum: float = option(0.9, "momentum of the weights' SGD", minimum=0, maximum=1)
    weight_decay: float = option(3e-4, "L2 penalty of the weights", minimum=0)
    grad_clip: float = option(5.0, "largest norm of the weights' gradient; alphas are never clipped", above=0)


@dataclass(frozen=True)
class Problem:
    """What to search on: the space, the images' shape, where to run, and how weights are trained."""

    space: DartsSpace
    classes: int
    in_channels: int
    weights: WeightSettings
    device: torch.device
    seed: int

    def generator(self, *stream: int) -> torch.Generator:
        """A CPU generator that depends on the seed and the numbers in `stream` alone: resuming needs no state."""
        mixed = self.seed
        for number in stream:
            mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % 2**63
        return torch.Generator().manual_seed(mixed)


def check_betas(betas: tuple[float, ...]) -> None:
    """Adam's decay rates: two numbers from 0 up to, but not including, 1. Raises UserError otherwise."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"arch-betas must be two numbers of at least 0 and below 1, got {','.join(map(str, betas))}")


class Method(Protocol):
    """A search method: weights and architecture, a step that trains both, and the genotype they amount to."""

    name: ClassVar[str]
    Settings: ClassVar[type]

    def __init__(self, settings: Any, problem: Problem) -> None: ...

    def start_epoch(self, epoch: int) -> None:
        """Set learning rates and phases for `epoch`, counted from 0."""

    def step(self, index: int, train: Batch, search: Batch) -> dict[str, Tensor]:
        """One search step, `index` counted over the whole search; 0-dim tensors to average, read by nobody here."""

    def end_epoch(self, search: Iterable[Batch]) -> dict[str, float]:
        """Figures of the epoch: at least `search_accuracy` and `entropy` (nats), measured on the search half."""

    def derive(self) -> Genotype:
        """The genotype of the current architecture parameters."""

    def state_dict(self) -> dict[str, Any]:
        """All that a bit-for-bit resume needs: tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
