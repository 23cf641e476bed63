"""DARTS (Liu, Simonyan and Yang 2019): bilevel optimisation of a continuous relaxation.

    min_alpha L_val(w*(alpha), alpha)   with   w*(alpha) = argmin_w L_train(w, alpha)            (eq. 3, 4)

Each step updates alpha on a batch of the search half, then w on a batch of the training half (Algorithm 1).
First order takes dL_val(w, alpha)/dalpha. Second order looks one weight step ahead, w' = w - xi dL_train/dw:

    dL_val(w', alpha)/dalpha - xi (dL_train(w+, alpha)/dalpha - dL_train(w-, alpha)/dalpha) / (2 eps),   (eq. 7, 8)
    w+- = w +- eps dL_val(w', alpha)/dw',   eps = 0.01 / ||dL_val(w', alpha)/dw'||
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnas import distributed
from fastnas.config import option
from fastnas.engine.mixture import Alphas, Mixture
from fastnas.engine.training import Batch, assign_gradients, evaluate, frozen
from fastnas.errors import UserError
from fastnas.methods.base import (
    Checkpointed,
    Figure,
    Problem,
    check_betas,
    edge_figures,
    set_weight_rate,
    shared_accuracy,
    train_weights,
    trained_together,
    weight_optimizer,
)
from fastnas.spaces import AnyGenotype, ArchitectureString, Nasbench201Space
from fastnas.spaces.derive import count_skips, derive_nasbench201, derive_top2, skips_and_edges

WEIGHTS, ARCHITECTURE, EVALUATION = 1, 2, 3  # uses of random channels
FINITE_DIFFERENCE = 1e-2  # eps times the gradient's norm, section 2.3


@dataclass(frozen=True)
class DartsSettings:
    """Settings of the architecture step; the defaults are the paper's (appendix A.1)."""

    order: int = option(1, "1: first order, fast; 2: second order, looks one weight step ahead", choices=(1, 2))
    arch_lr: float = option(3e-4, "learning rate of Adam for the architecture parameters", above=0)
    arch_betas: tuple[float, ...] = option((0.5, 0.999), "the two decay rates of that Adam", minimum=0, maximum=1)
    arch_weight_decay: float = option(1e-3, "L2 penalty of the architecture parameters", minimum=0)
    warmup_epochs: int = option(0, "epochs at the start in which only weights are trained", minimum=0)
    partial: int = option(1, "K: only 1/K of the channels pass the candidates (PC-DARTS); 1 is all", minimum=1)
    edge_normalisation: bool = option(False, "weigh the edges of a node by a softmax of beta (PC-DARTS)")

    random_channels: bool = option(False, "draw the channels that pass the candidates anew at each pass (PC-DARTS)")
    max_skips: int | None = option(None, "most skip connections in the derived normal cell; none is no cap", minimum=0)

    def __post_init__(self) -> None:
        check_betas(self.arch_betas)
        if self.random_channels and self.partial == 1:
            raise UserError("random-channels draws 1/K of the channels: give --partial 2 or more with it")


class Darts(Checkpointed):
    """DARTS, and with partial channels and edge normalisation PC-DARTS: see `fastnas.methods.pc_darts`."""

    name: ClassVar[str] = "darts"
    Settings: ClassVar[type] = DartsSettings
    parts: ClassVar[tuple[str, ...]] = ("supernet", "alphas", "weight_optimizer", "arch_optimizer")

    def __init__(self, settings: DartsSettings, problem: Problem) -> None:
        weights = problem.weights
        if settings.random_channels and isinstance(problem.space, Nasbench201Space):
            raise UserError("random-channels is for cells of the DARTS kind: drop it on NAS-Bench-201")
        if settings.random_channels and weights.storage != "float32":
            raise UserError("random channels run on the plain executor, which has no storage: drop --storage")
        self.settings, self.weights, self.problem = settings, weights, problem
        self.supernet = problem.supernet(k=settings.partial)
        self.alphas = Alphas(
            problem.space, edge_normalisation=settings.edge_normalisation, generator=problem.generator(0)
        ).to(problem.device)
        # Random channels run on the plain executor, which trains the modules' own weights.
        own = settings.random_channels
        self.parameters = list(self.supernet.parameters()) if own else trained_together(self.supernet)
        self.weight_optimizer = weight_optimizer(self.parameters, weights)
        self.arch_optimizer = torch.optim.Adam(
            self.alphas.parameters(),
            settings.arch_lr,
            betas=settings.arch_betas,
            weight_decay=settings.arch_weight_decay,
        )
        self.searching = False
        self.index = 0

    @property
    def graph_steps(self) -> tuple[str, ...] | str:
        """See `fastnas.methods.Method`."""
        if self.settings.random_channels:
            return "random channels are drawn by the host at each pass"
        return "weight_step", "architecture_step"

    @property
    def rate(self) -> float | Tensor:
        """Learning rate of the weights; a tensor where the steps are recorded."""
        return self.weight_optimizer.param_groups[0]["lr"]

    def start_epoch(self, epoch: int) -> None:
        self.supernet.train()
        self.epoch = epoch
        set_weight_rate(self.weight_optimizer, self.weights, epoch)
        self.searching = epoch >= self.settings.warmup_epochs

    def step(self, index: int, train: Batch, search: Batch) -> dict[str, Tensor]:
        self.index = index
        figures = {}
        if self.searching:
            figures["search_loss"] = self.architecture_step(train, search)
        return figures | self.weight_step(train)

    def mixture(self, use: int) -> Mixture:
        """The weights of all candidates, and the seed of the channels for this step and `use`."""
        mixture = self.alphas()
        if not self.settings.random_channels:
            return mixture
        return replace(mixture, channel_seed=self.problem.seed_of(use, self.index))

    def weight_step(self, train: Batch) -> dict[str, Tensor]:
        """One SGD step on w; alpha is a constant, so nothing is kept for its gradient."""
        mixture = self.mixture(WEIGHTS).detach()
        return train_weights(self.supernet, mixture, train, self.weight_optimizer, self.weights.grad_clip)

    def architecture_step(self, train: Batch, search: Batch) -> Tensor:
        """One Adam step on alpha (and beta); returns L_val."""
        gradient = self.first_order_gradient if self.settings.order == 1 else self.second_order_gradient
        loss, gradients = gradient(train, search)
        assign_gradients(list(self.alphas.parameters()), gradients)
        self.arch_optimizer.step()
        return loss

    def first_order_gradient(self, train: Batch, search: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """L_val(w, alpha) and its gradient by alpha; the weights are frozen, so their gradients cost nothing."""
        with frozen(self.parameters):
            return self._alpha_gradient(search)

    def second_order_gradient(self, train: Batch, search: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        """Equations 7 and 8: the gradient at w' less xi times the finite-difference Hessian-vector product.

        xi is the current learning rate. w' is one step of SGD with momentum and weight decay that leaves the momentum
        buffers alone. The weights end exactly as they began, and the pass at w' leaves no trace in the running
        statistics, while the three at w and w+- do, as in the released code.
        """
        parameters = self.parameters
        start = [parameter.detach().clone() for parameter in parameters]
        loss = F.cross_entropy(self.supernet(train[0], self.mixture(ARCHITECTURE).detach()), train[1])
        direction = self._sgd_direction(distributed.average(torch.autograd.grad(loss, parameters, allow_unused=True)))
        with torch.no_grad():
            if isinstance(self.rate, Tensor):
                torch._foreach_sub_(parameters, torch._foreach_mul(direction, self.rate))
            else:
                torch._foreach_add_(parameters, direction, alpha=-self.rate)

        buffers = [buffer.clone() for buffer in self.supernet.buffers()]
        alphas = list(self.alphas.parameters())
        search_loss = F.cross_entropy(self.supernet(search[0], self.mixture(ARCHITECTURE)), search[1])
        gradients = torch.autograd.grad(search_loss, alphas + parameters, allow_unused=True)
        gradients, vector = (
            _zero_for_none(gradients[: len(alphas)], alphas),
            _zero_for_none(distributed.average(gradients[len(alphas) :]), parameters),
        )
        with torch.no_grad():
            for buffer, before in zip(self.supernet.buffers(), buffers, strict=True):
                buffer.copy_(before)

        norm = torch.linalg.vector_norm(torch.stack([part.norm() for part in vector]))
        epsilon = FINITE_DIFFERENCE / norm
        steps = [epsilon * part for part in vector]
        sides = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                torch._foreach_copy_(parameters, start)
                torch._foreach_add_(parameters, steps, alpha=sign)
            with frozen(self.parameters):
                sides.append(self._alpha_gradient(train)[1])
        with torch.no_grad():
            torch._foreach_copy_(parameters, start)
        total = [
            gradient - self.rate * (plus - minus) / (2 * epsilon)
            for gradient, plus, minus in zip(gradients, *sides, strict=True)
        ]
        return search_loss.detach(), total

    def _alpha_gradient(self, batch: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        x, y = batch
        loss = F.cross_entropy(self.supernet(x, self.mixture(ARCHITECTURE)), y)
        return loss.detach(), _grad(loss, list(self.alphas.parameters()))

    def _sgd_direction(self, gradients: Sequence[Tensor | None]) -> list[Tensor]:
        """dL/dw + weight decay w + momentum buffer: what one SGD step would move along, its buffers unchanged."""
        directions = []
        for parameter, gradient in zip(self.parameters, _zero_for_none(gradients, self.parameters), strict=True):
            direction = gradient + self.weights.weight_decay * parameter.detach()
            buffer = self.weight_optimizer.state.get(parameter, {}).get("momentum_buffer")
            directions.append(direction if buffer is None else direction + self.weights.momentum * buffer)
        return directions

    def end_epoch(self, search: Iterable[Batch]) -> dict[str, Figure]:
        """Entropies and skip connections show a collapse (none of `max_skips` is in these counts). `child_accuracy` is
        that of the derived network with the shared weights, no fine-tuning, as in Table 1 of SNAS."""
        self.supernet.eval()
        figures: dict[str, Figure] = {}
        with torch.no_grad():
            mixture = self.mixture(EVALUATION)
            figures["search_accuracy"] = evaluate(lambda x: self.supernet(x, mixture), search)["accuracy"]
            if self.settings.partial == 1:
                figures["child_accuracy"] = shared_accuracy(self.supernet, self.derive(), search)
        figures |= edge_figures(mixture.normal, mixture.reduce)
        for cell, weights in (("normal", mixture.normal_edges), ("reduce", mixture.reduce_edges)):
            if weights is not None and len(weights):
                figures[f"edge_weights_{cell}"] = weights.tolist()
        uncapped = self._derive(mixture, None)
        if isinstance(uncapped, ArchitectureString):
            skips, _ = skips_and_edges(uncapped)["normal"]
            return figures | {"skips_normal": float(skips)}
        return figures | {
            "skips_normal": float(count_skips(uncapped.normal)),
            "skips_reduce": float(count_skips(uncapped.reduce)),
        }

    def derive(self) -> AnyGenotype:
        return self._derive(self.alphas(), self.settings.max_skips)

    def _derive(self, mixture: Mixture, max_skips: int | None) -> AnyGenotype:
        """Top-2 on DARTS-like cells; on NAS-Bench-201 the best candidate of each edge, `none` among them."""
        space = self.alphas.space
        if isinstance(space, Nasbench201Space):
            return derive_nasbench201(space, mixture.normal, max_skips=max_skips)
        return derive_top2(
            self.alphas.space,
            mixture.normal,
            mixture.reduce,
            mixture.normal_edges,
            mixture.reduce_edges,
            max_skips=max_skips,
        )


def _grad(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    return _zero_for_none(torch.autograd.grad(loss, parameters, allow_unused=True), parameters)


def _zero_for_none(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> list[Tensor]:
    return [
        torch.zeros_like(parameter) if gradient is None else gradient
        for gradient, parameter in zip(gradients, parameters, strict=True)
    ]
