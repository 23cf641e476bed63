"""ProxylessNAS (Cai, Zhu and Han 2019), its binary gates on a cell space: one path for weights, two for architecture.

Each edge has probabilities p = softmax(alpha) and a gate g that is one-hot: m(x) = sum_i g_i o_i(x), g ~ p (eq. 2, 3).

Weights: a path is drawn by p, and only its weights are trained, on the training half.

Architecture, on the search half: two candidates of an edge are drawn by p, the others are masked, and the gate of these
two is drawn by their rescaled probabilities. With the gradients dL/dg of both gates (both candidates are run)

    dL/dalpha_i = sum_j dL/dg_j dp_j/dalpha_i = sum_j dL/dg_j p_j (delta_ij - p_i)                 (eq. 4)

moves the two alphas; then both are shifted by one number so that the pair's total probability is what it was, and the
candidates that were not drawn keep theirs (section 3.2). So memory is that of two paths, whatever the candidates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnas.config import option
from fastnas.engine.mixture import Alphas, Mixture
from fastnas.engine.training import Batch, assign_gradients, frozen
from fastnas.methods.base import (
    Checkpointed,
    Figure,
    Problem,
    check_betas,
    edge_figures,
    set_weight_rate,
    shared_accuracy,
    train_weights,
    weight_optimizer,
)
from fastnas.spaces import AnyGenotype
from fastnas.spaces.derive import derive_all_edges

WEIGHT_STEP, ARCHITECTURE_STEP = 1, 2  # streams of random numbers


@dataclass(frozen=True)
class ProxylessSettings:
    """The defaults are those of the released code, but for the warm-up of 40 epochs that ImageNet gets there."""

    arch_lr: float = option(1e-3, "learning rate of Adam for the architecture parameters", above=0)
    arch_betas: tuple[float, ...] = option((0.0, 0.999), "the two decay rates of that Adam", minimum=0, maximum=1)
    arch_interval: int = option(5, "weight steps from one architecture step to the next", minimum=1)
    warmup_epochs: int = option(1, "epochs at the start in which only weights are trained", minimum=0)

    def __post_init__(self) -> None:
        check_betas(self.arch_betas)


@dataclass(frozen=True)
class Pair:
    """Two candidates of each edge of a cell type. `candidates`: int64 [E, 2]; `active`: int64 [E], 0 or 1."""

    candidates: Tensor
    active: Tensor


class Proxyless(Checkpointed):
    """See the module's docstring. Every edge of a cell has its own choice, and `none` drops it."""

    name: ClassVar[str] = "proxyless"
    Settings: ClassVar[type] = ProxylessSettings
    parts: ClassVar[tuple[str, ...]] = ("supernet", "alphas", "weight_optimizer", "arch_optimizer")
    graph_steps: ClassVar[str] = "another path is trained at every step"

    def __init__(self, settings: Any, problem: Problem) -> None:
        self.settings, self.weights, self.problem = settings, problem.weights, problem
        self.supernet = problem.supernet()
        self.alphas = Alphas(problem.space, generator=problem.generator(0)).to(problem.device)
        self.weight_optimizer = weight_optimizer(self.supernet.parameters(), problem.weights)
        # Adam's first rate is 0 and there is no weight decay, so that an alpha without a gradient does not move.
        self.arch_optimizer = torch.optim.Adam(self.alphas.parameters(), settings.arch_lr, betas=settings.arch_betas)
        self.searching = False

    def start_epoch(self, epoch: int) -> None:
        self.supernet.train()
        self.epoch = epoch
        set_weight_rate(self.weight_optimizer, self.weights, epoch)
        self.searching = epoch >= self.settings.warmup_epochs

    def sample_path(self, index: int) -> AnyGenotype:
        """The path that the weight step `index` trains: one candidate of each edge, by p."""
        generator = self.problem.generator(WEIGHT_STEP, index)
        chosen = [draw(alpha, 1, generator)[:, 0].tolist() for alpha in self.alphas.parameters()]
        return self.problem.space.free_edges(*chosen)

    def sample_pairs(self, index: int) -> list[Pair]:
        """Two candidates of each edge without replacement, by p, and which of them the gate opens."""
        generator = self.problem.generator(ARCHITECTURE_STEP, index)
        pairs = []
        for alpha in self.alphas.parameters():
            candidates = draw(alpha, 2, generator)
            active = draw(alpha.detach().cpu().gather(1, candidates), 1, generator)[:, 0]
            pairs.append(Pair(candidates, active))
        return pairs

    def step(self, index: int, train: Batch, search: Batch) -> dict[str, Tensor]:
        figures = {}
        if self.searching and index % self.settings.arch_interval == 0:
            figures["search_loss"] = self.architecture_step(self.sample_pairs(index), search)
        path = self.sample_path(index)
        return figures | train_weights(self.supernet, path, train, self.weight_optimizer, self.weights.grad_clip)

    def architecture_step(self, pairs: Sequence[Pair], search: Batch) -> Tensor:
        """One Adam step on the alphas of the pairs by equation 4, then the shift; returns the loss."""
        alphas = list(self.alphas.parameters())
        pairs = [
            Pair(pair.candidates.to(a.device), pair.active.to(a.device)) for pair, a in zip(pairs, alphas, strict=True)
        ]
        loss, gate_gradients = self.gate_gradients(pairs, search)
        gradients = [
            two_path_gradient(a, pair.candidates, g) for a, pair, g in zip(alphas, pairs, gate_gradients, strict=True)
        ]
        before = [alpha.detach().clone() for alpha in alphas]
        assign_gradients(alphas, gradients)
        self.arch_optimizer.step()
        with torch.no_grad():
            for alpha, old, pair in zip(alphas, before, pairs, strict=True):
                keep_total_probability(alpha, old, pair.candidates)
        return loss

    def gate_gradients(self, pairs: Sequence[Pair], search: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """L of the active paths and dL/dg [E, O] of both cell types; both candidates of a pair are run."""
        gates = []
        for alpha, pair in zip(self.alphas.parameters(), pairs, strict=True):
            chosen = pair.candidates.gather(1, pair.active[:, None])
            gates.append(torch.zeros_like(alpha).scatter(1, chosen, 1.0).requires_grad_())
        # Equal candidates are run once: such a pair has nothing to choose.
        run = [[sorted(set(two)) for two in pair.candidates.tolist()] for pair in pairs]
        mixture = Mixture(*gates, normal_active=run[0], reduce_active=run[1])
        x, y = search
        with frozen(self.supernet.parameters()):
            loss = F.cross_entropy(self.supernet(x, mixture), y)
            return loss.detach(), torch.autograd.grad(loss, gates, materialize_grads=True)

    def end_epoch(self, search: Iterable[Batch]) -> dict[str, Figure]:
        """Accuracy of the most probable path with the shared weights, and the mean entropy of an edge."""
        self.supernet.eval()
        probabilities = self.alphas()
        figures: dict[str, Figure] = {"search_accuracy": shared_accuracy(self.supernet, self.derive(), search)}
        return figures | edge_figures(probabilities.normal, probabilities.reduce)

    def derive(self) -> AnyGenotype:
        return derive_all_edges(self.problem.space, self.alphas.alpha_normal, self.alphas.alpha_reduce)


def draw(alpha: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` indices of each row of alpha [E, O], by softmax(alpha) without replacement: int64 [E, count] on the CPU.

    The places of the smallest exponentials E_i / p_i; the noise is drawn on the CPU, so every device draws the same.
    """
    exponential = -torch.log1p(-torch.rand(alpha.shape, generator=generator, dtype=torch.float64))
    race = exponential / alpha.detach().double().cpu().softmax(-1)
    return race.topk(count, largest=False).indices


def two_path_gradient(alpha: Tensor, pairs: Tensor, gate_gradient: Tensor) -> Tensor:
    """Equation 4 within each pair: [E, O], zero for the candidates that were not drawn and where both are the same."""
    g = gate_gradient.gather(1, pairs)
    p = alpha.detach().gather(1, pairs).softmax(-1)
    gradient = p * (g - (p * g).sum(-1, keepdim=True))
    return torch.zeros_like(alpha).scatter(1, pairs, gradient)


def keep_total_probability(alpha: Tensor, before: Tensor, pairs: Tensor) -> None:
    """Shift the two alphas of each pair by one number so that exp(alpha) sums to what it did `before`; in place."""
    now = alpha.gather(1, pairs)
    shift = before.gather(1, pairs).logsumexp(-1, keepdim=True) - now.logsumexp(-1, keepdim=True)
    alpha.scatter_(1, pairs, now + shift)
