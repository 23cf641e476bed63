"""SNAS (Xie et al. 2019): one loss for weights and architecture, through samples of a relaxed categorical.

The architecture is a one-hot Z_ij on each edge, x_j = sum_{i<j} Z_ij^T O_ij(x_i) (eq. 2), drawn from a factorised
p(Z) with parameters alpha. Both are trained for the expected loss and cost of the samples (eq. 4, 9):

    min_{theta, alpha} E_{Z ~ p_alpha}[L_theta(Z) + eta C(Z)]

Z is relaxed to the concrete distribution, with Gumbel noise G and a temperature lambda that goes down (eq. 5):

    Z_ij^k = exp((log alpha_ij^k + G_ij^k) / lambda) / sum_l exp((log alpha_ij^l + G_ij^l) / lambda)

so that one backward pass gives both gradients (eq. 6); the one for alpha, the search gradient, is

    dL/dalpha_ij^k = dL/dx_j O_ij^T(x_i) (delta(k' - k) - Z_ij) Z_ij^k / (lambda alpha_ij^k)

Its mean is a policy gradient whose credit for edge (i, j) is local, -dL/dx_j O~_ij(x_i) (eq. 7, 8). The cost is linear
in Z (eq. 10). The network that is left at the end has the most probable candidate on every edge; `none` drops an edge.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnas.config import option
from fastnas.engine.cost import NetworkCost, nasbench201_costs
from fastnas.engine.mixture import Alphas, Mixture
from fastnas.engine.training import Batch, accuracy, assign_gradients
from fastnas.methods.base import (
    Checkpointed,
    Figure,
    Problem,
    check_betas,
    edge_figures,
    set_weight_rate,
    shared_accuracy,
    trained_together,
    weight_optimizer,
)
from fastnas.ops import gumbel_softmax
from fastnas.spaces import AnyGenotype, Nasbench201Space
from fastnas.spaces.derive import derive_all_edges

RESOURCE_WEIGHTS = {"none": 0.0, "mild": 0.1, "moderate": 0.3, "aggressive": 1.0}  # eta; the paper gives no values
STEP, EVALUATION = 1, 2  # streams of noise


@dataclass(frozen=True)
class SnasSettings:
    """The defaults are the paper's (section 3.1, appendix G.1), the temperatures those of its released code."""

    arch_lr: float = option(3e-4, "learning rate of Adam for the architecture parameters", above=0)
    arch_betas: tuple[float, ...] = option((0.5, 0.999), "the two decay rates of that Adam", minimum=0, maximum=1)
    arch_weight_decay: float = option(1e-3, "L2 penalty of the architecture parameters", minimum=0)
    temperature: float = option(1.0, "temperature of the samples in the first epoch", above=0)
    temperature_end: float = option(0.03, "temperature that the linear schedule ends at", above=0)
    resource: str = option("mild", "how much parameters, FLOPs and memory cost", choices=tuple(RESOURCE_WEIGHTS))

    def __post_init__(self) -> None:
        check_betas(self.arch_betas)


class Snas(Checkpointed):
    """See the module's docstring. The search half of the data is for measuring only."""

    name: ClassVar[str] = "snas"
    Settings: ClassVar[type] = SnasSettings
    parts: ClassVar[tuple[str, ...]] = ("supernet", "log_alphas", "weight_optimizer", "arch_optimizer")
    graph_steps: ClassVar[tuple[str, ...]] = ("joint_step",)

    def __init__(self, settings: SnasSettings, problem: Problem) -> None:
        weights, space = problem.weights, problem.space
        self.settings, self.weights, self.problem = settings, weights, problem
        self.supernet = problem.supernet()
        self.log_alphas = Alphas(space, generator=problem.generator(0)).to(problem.device)
        self.parameters = trained_together(self.supernet)
        self.weight_optimizer = weight_optimizer(self.parameters, weights)
        self.arch_optimizer = torch.optim.Adam(
            self.log_alphas.parameters(),
            settings.arch_lr,
            betas=settings.arch_betas,
            weight_decay=settings.arch_weight_decay,
        )
        self.resource_weight = RESOURCE_WEIGHTS[settings.resource]
        self.costs = tuple(table.float().to(problem.device) for table in relative_costs(problem))

    def start_epoch(self, epoch: int) -> None:
        self.supernet.train()
        self.epoch = epoch
        set_weight_rate(self.weight_optimizer, self.weights, epoch)
        start, end = self.settings.temperature, self.settings.temperature_end
        self.temperature = start + (end - start) * epoch / max(1, self.weights.epochs - 1)

    def seeds(self, *stream: int) -> tuple[int, int]:
        """Of the noise of both cell types."""
        return self.problem.seed_of(*stream, 0), self.problem.seed_of(*stream, 1)

    def sample(self, *stream: int) -> Mixture:
        """Z of equation 5 for both cell types; one sample is shared by all cells of a type and all images."""
        return self._relax(self.seeds(*stream), self.temperature)

    def _relax(self, seeds: Sequence[int | Tensor], temperature: float | Tensor) -> Mixture:
        alphas = self.log_alphas.alpha_normal, self.log_alphas.alpha_reduce
        samples = (gumbel_softmax(alpha, temperature, seed=seed) for alpha, seed in zip(alphas, seeds, strict=True))
        return Mixture(*samples)

    def cost(self, z: Mixture) -> Tensor:
        """C(Z) of equation 10; 1 for a Z that is uniform over the candidates."""
        normal, reduce = self.costs
        return (normal * z.normal).sum() + (reduce * z.reduce).sum()

    def step(self, index: int, train: Batch, search: Batch) -> dict[str, Tensor]:
        """One sample, one pass, one update of theta and of alpha from the same loss."""
        return self.joint_step(train, self.seeds(STEP, index), self.temperature)

    def joint_step(self, train: Batch, seeds: Sequence[int | Tensor], temperature: float | Tensor) -> dict[str, Tensor]:
        """`step` for a sample of these seeds; numbers, or 0-dim tensors on the device."""
        x, y = train
        z = self._relax(seeds, temperature)
        logits = self.supernet(x, z)
        loss, cost = F.cross_entropy(logits, y), self.cost(z)
        alphas = list(self.log_alphas.parameters())
        gradients = torch.autograd.grad(loss + self.resource_weight * cost, alphas + self.parameters, allow_unused=True)
        assign_gradients(alphas + self.parameters, gradients)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.weights.grad_clip)
        self.weight_optimizer.step()
        self.arch_optimizer.step()
        return {"loss": loss.detach(), "accuracy": accuracy(logits.detach(), y), "cost": cost.detach()}

    def end_epoch(self, search: Iterable[Batch]) -> dict[str, Figure]:
        """`search_accuracy` of samples and `child_accuracy` of the derived network with the shared weights, no
        fine-tuning (the paper's Table 1), and the entropy of each edge (its Figure 4)."""
        self.supernet.eval()
        z = self.sample(EVALUATION, self.epoch).detach()
        with torch.no_grad():
            probabilities = self.log_alphas()
        return {
            "search_accuracy": shared_accuracy(self.supernet, z, search),
            "child_accuracy": shared_accuracy(self.supernet, self.derive(), search),
            "temperature": self.temperature,
        } | edge_figures(probabilities.normal, probabilities.reduce)

    def derive(self) -> AnyGenotype:
        return derive_all_edges(self.problem.space, self.log_alphas.alpha_normal, self.log_alphas.alpha_reduce)


def relative_costs(problem: Problem) -> tuple[Tensor, Tensor]:
    """C(O_ij) of the normal and the reduction cells, float64 [E, O] each: the mean of parameters, FLOPs and memory
    access (appendix F needs all three to tell the kinds of operations apart), each relative to its value for a Z
    that is uniform over the candidates."""
    weights, kept = problem.weights, torch.tensor([0, 2, 3])  # parameters, FLOPs, memory access
    if isinstance(problem.space, Nasbench201Space):
        table = nasbench201_costs(
            problem.space, channels=weights.channels, cells=weights.cells, image_size=problem.image_size
        )[kept]
        return (table / table.mean(-1).sum(-1)[:, None, None]).mean(0), torch.zeros(0, table.shape[-1])
    costs = NetworkCost(
        problem.space,
        channels=weights.channels,
        cells=weights.cells,
        image_size=problem.image_size,
        classes=problem.classes,
        in_channels=problem.in_channels,
        stem=weights.stem,
    )
    normal, reduce = costs.normal[kept], costs.reduce[kept]
    uniform = (normal.mean(-1).sum(-1) + reduce.mean(-1).sum(-1)).clamp_min(1.0)[:, None, None]
    return (normal / uniform).mean(0), (reduce / uniform).mean(0)
