"""PC-DARTS (Xu et al. 2020): DARTS on 1/K of the channels, with edge normalisation and a warm-up of the weights.

    f(x_i) = sum_o softmax(alpha_ij)_o o(S_ij * x_i) + (1 - S_ij) * x_i                                     (eq. 1)
    x_j = sum_{i<j} softmax_i(beta_ij) f(x_i)                                                               (eq. 2)

S_ij selects the first C/K channels and the output's channels are shuffled with K groups, which is the paper's own
implementation (end of section 4.1), or, with `random_channels`, a seeded random C/K of them at each pass (section 3.2).
Edges and candidates are ranked by softmax(beta) * softmax(alpha).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fastnas.config import option
from fastnas.methods.darts import Darts, DartsSettings


@dataclass(frozen=True)
class PCDartsSettings(DartsSettings):
    """The defaults are the paper's for CIFAR-10 (section 4.2)."""

    arch_lr: float = option(6e-4, "learning rate of Adam for the architecture parameters", above=0)
    warmup_epochs: int = option(15, "epochs at the start in which only weights are trained", minimum=0)
    partial: int = option(4, "K: only 1/K of the channels pass the candidates; 1 is all", minimum=1)
    edge_normalisation: bool = option(True, "weigh the edges of a node by a softmax of beta")


class PCDarts(Darts):
    """See the module's docstring; everything but the settings is DARTS with K and beta."""

    name: ClassVar[str] = "pc_darts"
    Settings: ClassVar[type] = PCDartsSettings
