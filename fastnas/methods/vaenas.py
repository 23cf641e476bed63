"""VAENAS: a variational autoencoder learns which architectures to train (VAENAS, Algorithms 2 and 3).

Every few epochs N_s architectures are scored with the shared weights, and the autoencoder p_theta(alpha | z) is trained
on the best of them (Algorithm 1, `fastnas.methods.vae`).

One-shot (Algorithm 2): paths come from a mixture whose epsilon starts at 0 and grows with every step,

    Gamma(alpha) = (1 - epsilon) U(alpha) + epsilon p_theta(alpha | z)                              (eq. 5)

and so do the architectures that are scored. An evolution that starts from samples of p_theta ends the search.

Gradient-based (Algorithm 3): paths for weights and for architecture parameters both come from Gamma = p_theta (eq. 6),
the scored architectures from U(alpha). The architecture parameters are trained by two paths, as in ProxylessNAS, and
the most probable candidate of each edge ends the search.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastnas.config import option
from fastnas.engine.training import Batch, first
from fastnas.errors import UserError
from fastnas.methods.base import Figure, Problem, shared_accuracy
from fastnas.methods.evolution import RANDOM_TRIES
from fastnas.methods.proxyless import Pair, Proxyless, ProxylessSettings
from fastnas.methods.spos import STEP, Spos, SposSettings
from fastnas.methods.vae import ArchitectureVae, train_vae
from fastnas.spaces import AnyGenotype
from fastnas.spaces.strings import FreeStrings, String, Strings

INITIAL, SAMPLE, RANK, TRAIN, SEEDS = 10, 11, 12, 13, 14  # streams of random numbers


@dataclass(frozen=True)
class VaeSettings:
    """The paper gives K = 50 % (Figure 1) and no other of these numbers."""

    ranked: int = option(100, "N_s: architectures that are scored each time", minimum=2)
    rank_batches: int | None = option(4, "batches of the search half that score each; none takes all", minimum=1)
    top_share: float = option(
        0.5, "K: share of the scored architectures that train the autoencoder", above=0, maximum=1
    )
    vae_interval: int = option(1, "n_vae: epochs from one training of the autoencoder to the next", minimum=1)
    vae_iterations: int = option(100, "training steps of the autoencoder each time", minimum=1)
    vae_lr: float = option(1e-3, "learning rate of Adam for the autoencoder", above=0)
    vae_hidden: int = option(64, "width of the autoencoder's LSTMs", minimum=1)
    vae_latent: int = option(16, "dimensions of z", minimum=1)


class Sampler:
    """The autoencoder of a search with its optimiser, and Algorithm 1 on scored architectures."""

    def __init__(self, settings: VaeSettings, problem: Problem, strings: Strings) -> None:
        self.settings, self.problem, self.strings = settings, problem, strings
        self.vae = ArchitectureVae(
            strings.choices,
            hidden=settings.vae_hidden,
            latent=settings.vae_latent,
            generator=problem.generator(INITIAL),
        )
        self.optimizer = torch.optim.Adam(self.vae.parameters(), settings.vae_lr)

    def sample(self, count: int, *stream: int) -> list[String]:
        """From p_theta; a function of its parameters, the seed and the stream. What is no valid string is drawn again.

        Raises UserError when hardly any is valid.
        """
        generator = self.problem.generator(*stream)
        found: list[String] = []
        for _ in range(RANDOM_TRIES):
            found += [string for string in self.vae.sample(count, generator) if self.strings.is_valid(string)]
            if len(found) >= count:
                return found[:count]
        raise UserError("the autoencoder draws hardly any valid architecture: give more --ranked or --vae-iterations")

    def is_due(self, epoch: int) -> bool:
        return (epoch + 1) % self.settings.vae_interval == 0

    def learn(self, scored: Sequence[tuple[String, float]], epoch: int) -> dict[str, Figure]:
        """Algorithm 1; returns the lower bound and the accuracies of all and of the kept architectures."""
        settings = self.settings
        bound = train_vae(
            self.vae,
            self.optimizer,
            scored,
            top_share=settings.top_share,
            iterations=settings.vae_iterations,
            generator=self.problem.generator(TRAIN, epoch),
        )
        accuracies = sorted((accuracy for _, accuracy in scored), reverse=True)
        kept = accuracies[: max(1, round(settings.top_share * len(accuracies)))]
        return {
            "vae_bound": bound,
            "ranked_accuracy": sum(accuracies) / len(accuracies),
            "kept_accuracy": sum(kept) / len(kept),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"vae": self.vae.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.vae.load_state_dict(state["vae"])
        self.optimizer.load_state_dict(state["optimizer"])


@dataclass(frozen=True)
class VaenasOneShotSettings(SposSettings, VaeSettings):
    """The evolution's defaults are those of Single Path One-Shot, as in the paper."""

    epsilon_step: float = option(5e-5, "epsilon_inc: what each step adds to epsilon, which ends at 1", above=0)
    vae_seeds: int = option(50, "N_seeds: samples of the autoencoder in the evolution's first population", minimum=0)


class VaenasOneShot(Spos):
    """Algorithm 2: Single Path One-Shot with learnt sampling."""

    name: ClassVar[str] = "vaenas_os"
    Settings: ClassVar[type] = VaenasOneShotSettings

    def __init__(self, settings: VaenasOneShotSettings, problem: Problem) -> None:
        super().__init__(settings, problem)
        self.sampler = Sampler(settings, problem, self.strings)

    def epsilon(self, index: int) -> float:
        """Exploitation at step `index`, counted from 0 over the whole search (lines 1 and 11)."""
        return min(1.0, index * self.settings.epsilon_step)

    def gamma(self, epsilon: float, count: int, *stream: int) -> list[String]:
        """`count` architectures from the mixture of equation 5."""
        rng = random.Random(self.problem.seed_of(*stream, 0))
        learnt = sum(rng.random() < epsilon for _ in range(count))
        uniform = [self.strings.random_string(rng) for _ in range(count - learnt)]
        return (self.sampler.sample(learnt, *stream, 1) if learnt else []) + uniform

    def step(self, index: int, train: Batch, search: Batch) -> dict[str, Tensor]:
        self.steps = index + 1
        return super().step(index, train, search)

    def sample(self, index: int) -> String:
        return self.gamma(self.epsilon(index), 1, STEP, index)[0]

    def end_epoch(self, search: Iterable[Batch]) -> dict[str, Figure]:
        """Lines 5 to 10, then what Single Path One-Shot does."""
        figures: dict[str, Figure] = {"epsilon": self.epsilon(self.steps)}
        if self.sampler.is_due(self.epoch):
            self.supernet.eval()
            drawn = self.gamma(self.epsilon(self.steps), self.settings.ranked, RANK, self.epoch)
            batches = list(first(search, self.settings.rank_batches))
            figures |= self.sampler.learn([(string, self.accuracy(string, batches)) for string in drawn], self.epoch)
        return super().end_epoch(search) | figures

    def seeds(self) -> Sequence[String]:
        """Line 13: samples of p_theta within the limits."""
        wanted = min(self.settings.vae_seeds, self.settings.population)
        found: list[String] = []
        for attempt in range(RANDOM_TRIES // 10):
            if len(found) >= wanted or not wanted:
                break
            drawn = self.sampler.sample(wanted, SEEDS, attempt)
            found += [string for string in drawn if self.limits.allow(self.space.decode(string))]
        return found[:wanted]

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.sampler.load_state_dict(state["sampler"])


@dataclass(frozen=True)
class VaenasGradientSettings(ProxylessSettings, VaeSettings):
    """Those of the gates and of the autoencoder."""


class VaenasGradient(Proxyless):
    """Algorithm 3: binary gates whose two paths come from the autoencoder. Its strings name every edge's candidate."""

    name: ClassVar[str] = "vaenas_g"
    Settings: ClassVar[type] = VaenasGradientSettings

    def __init__(self, settings: VaenasGradientSettings, problem: Problem) -> None:
        super().__init__(settings, problem)
        edges = problem.space.num_edges + problem.space.num_reduction_edges
        self.strings = FreeStrings((len(problem.space.candidates),) * edges)
        self.sampler = Sampler(settings, problem, self.strings)

    def _genotype(self, string: String) -> AnyGenotype:
        edges = self.problem.space.num_edges
        return self.problem.space.free_edges(string[:edges], string[edges:])

    def sample_path(self, index: int) -> AnyGenotype:
        return self._genotype(self.sampler.sample(2, SAMPLE, index)[0])

    def sample_pairs(self, index: int) -> list[Pair]:
        """Two samples of p_theta: the first is the path that the weight step of this index trains, and its gates are
        open. Where both name one candidate, the edge learns nothing."""
        both = torch.tensor(self.sampler.sample(2, SAMPLE, index)).T
        edges = self.problem.space.num_edges
        opened = torch.zeros(len(both), dtype=torch.int64)
        return [Pair(both[:edges], opened[:edges]), Pair(both[edges:], opened[edges:])]

    def end_epoch(self, search: Iterable[Batch]) -> dict[str, Figure]:
        """Lines 5 to 10: score uniform architectures, train the autoencoder."""
        figures: dict[str, Figure] = {}
        if self.sampler.is_due(self.epoch):
            self.supernet.eval()
            rng = random.Random(self.problem.seed_of(RANK, self.epoch))
            drawn = [self.strings.random_string(rng) for _ in range(self.settings.ranked)]
            batches = list(first(search, self.settings.rank_batches))
            scored = [(string, shared_accuracy(self.supernet, self._genotype(string), batches)) for string in drawn]
            figures = self.sampler.learn(scored, self.epoch)
        return super().end_epoch(search) | figures

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"sampler": self.sampler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.sampler.load_state_dict(state["sampler"])
