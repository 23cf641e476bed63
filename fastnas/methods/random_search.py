"""Random search at the same budget: the baseline that every comparison needs.

`samples` genotypes are drawn uniformly (two distinct inputs a node, any candidate but `none`). Each is trained from
scratch for an equal share of the epochs; the one with the best accuracy on the search half wins.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnas.config import option
from fastnas.engine.networks import build_network
from fastnas.engine.training import Batch, accuracy, average_gradients, cosine, evaluate, set_learning_rate
from fastnas.errors import UserError
from fastnas.methods.base import Problem
from fastnas.spaces.genotype import Genotype


@dataclass(frozen=True)
class RandomSettings:
    samples: int = option(5, "genotypes drawn and trained; each gets epochs / samples epochs", minimum=1)


class RandomSearch:
    """See the module's docstring. Children are trained in the network size of the search."""

    name: ClassVar[str] = "random"
    Settings: ClassVar[type] = RandomSettings
    graph_steps: ClassVar[str] = "every child is a network of its own"

    def __init__(self, settings: RandomSettings, problem: Problem) -> None:
        if settings.samples > problem.weights.epochs:
            raise UserError(
                f"random search trains each sample for at least one epoch: {settings.samples} samples need "
                f"at least {settings.samples} epochs, got {problem.weights.epochs}"
            )
        self.settings, self.weights, self.problem = settings, problem.weights, problem
        rng = random.Random(problem.seed)
        self.genotypes = [problem.space.random_genotype(rng) for _ in range(settings.samples)]
        self.scores: list[float] = []
        self._build(0)

    def _first_epoch(self, child: int) -> int:
        return child * self.weights.epochs // self.settings.samples

    def _build(self, child: int) -> None:
        """A fresh network for genotype `child`, its weights drawn from the seed and the child's number alone."""
        weights, problem = self.weights, self.problem
        self.child = child
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(problem.generator(child).initial_seed())
            self.network = build_network(
                self.genotypes[child],
                channels=weights.channels,
                cells=weights.cells,
                classes=problem.classes,
                in_channels=problem.in_channels,
                stem=weights.stem,
            ).to(problem.device)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), weights.lr, weights.momentum, weight_decay=weights.weight_decay
        )

    def start_epoch(self, epoch: int) -> None:
        child = next(c for c in reversed(range(self.settings.samples)) if epoch >= self._first_epoch(c))
        if child != self.child:
            self._build(child)
        self.network.train()
        first, end = self._first_epoch(child), self._first_epoch(child + 1)
        set_learning_rate(self.optimizer, cosine(epoch - first, end - first, self.weights.lr, self.weights.lr_min))
        self.last_epoch_of_child = epoch == end - 1

    def step(self, index: int, train: Batch, search: Batch) -> dict[str, Tensor]:
        x, y = train
        logits = self.network(x)
        loss = F.cross_entropy(logits, y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(list(self.network.parameters()))
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.weights.grad_clip)
        self.optimizer.step()
        return {"loss": loss.detach(), "accuracy": accuracy(logits.detach(), y)}

    def end_epoch(self, search: Iterable[Batch]) -> dict[str, float]:
        self.network.eval()
        figures = evaluate(self.network, search)
        if self.last_epoch_of_child:
            self.scores.append(figures["accuracy"])
        return {"search_accuracy": figures["accuracy"], "entropy": 0.0, "child": float(self.child)}

    def derive(self) -> Genotype:
        """The best genotype scored so far; the first one while none is."""
        best = max(range(len(self.scores)), key=self.scores.__getitem__, default=0)
        return self.genotypes[best]

    def state_dict(self) -> dict[str, Any]:
        return {
            "child": self.child,
            "scores": list(self.scores),
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._build(state["child"])
        self.scores = list(state["scores"])
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
