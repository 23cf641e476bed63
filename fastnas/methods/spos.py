"""Single Path One-Shot (Guo et al. 2020): uniform single paths train the weights, evolution searches afterwards.

    W = argmin_W E_{a ~ U(A)} [L_train(N(a, W(a)))]                                     (VAENAS, eq. 3)
    a* = argmax_a ACC_val(N(a, W(a)))   within limits on size                           (VAENAS, eq. 4)

One architecture is drawn uniformly at each step and only its weights are trained. After the last epoch an evolution
(Algorithm 1, `fastnas.methods.evolution`) looks for the best one. Before an architecture is scored, its statistics of
batch normalisation are taken anew on training images, as the shared ones mix all paths.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from fastnas.config import option
from fastnas.engine.training import Batch, evaluate, first, recalibrate
from fastnas.methods.base import (
    Checkpointed,
    Figure,
    Problem,
    set_weight_rate,
    shared_accuracy,
    train_weights,
    weight_optimizer,
)
from fastnas.methods.evolution import EvolutionSettings, Limits, evolve
from fastnas.spaces import strings_of
from fastnas.spaces.genotype import Genotype
from fastnas.spaces.strings import String

STEP, EPOCH, EVOLUTION = 1, 2, 3  # streams of random numbers
PROBES = 3  # random architectures whose mean accuracy shows how the weights come on


@dataclass(frozen=True)
class SposSettings(EvolutionSettings):
    recalibration_batches: int = option(200, "training batches for the statistics of an architecture", minimum=1)
    score_batches: int | None = option(None, "batches of the search half that score it; none takes all", minimum=1)


class Spos(Checkpointed):
    """See the module's docstring. An architecture is a string of the space's choices."""

    name: ClassVar[str] = "spos"
    Settings: ClassVar[type] = SposSettings
    parts: ClassVar[tuple[str, ...]] = ("supernet", "weight_optimizer")
    graph_steps: ClassVar[str] = "another path is trained at every step"

    def __init__(self, settings: SposSettings, problem: Problem) -> None:
        self.settings, self.weights, self.problem = settings, problem.weights, problem
        self.space, self.strings = problem.space, strings_of(problem.space)
        self.supernet = problem.supernet()
        self.weight_optimizer = weight_optimizer(self.supernet.parameters(), problem.weights)
        self.limits = Limits(settings, problem)
        self.found: String | None = None

    def start_epoch(self, epoch: int) -> None:
        self.supernet.train()
        self.epoch = epoch
        set_weight_rate(self.weight_optimizer, self.weights, epoch)
        self.recent: deque[Batch] = deque(maxlen=self.settings.recalibration_batches)

    def sample(self, index: int) -> String:
        """The architecture of step `index`, from U(A)."""
        return self.strings.random_string(random.Random(self.problem.seed_of(STEP, index)))

    def step(self, index: int, train: Batch, search: Batch) -> dict[str, Tensor]:
        """Train the weights of one sampled architecture."""
        self.recent.append(train)
        path = self.space.decode(self.sample(index))
        return train_weights(self.supernet, path, train, self.weight_optimizer, self.weights.grad_clip)

    def end_epoch(self, search: Iterable[Batch]) -> dict[str, Figure]:
        """Mean accuracy of a few random architectures; after the last epoch that of the evolution's best."""
        self.supernet.eval()
        if self.epoch < self.weights.epochs - 1:
            rng = random.Random(self.problem.seed_of(EPOCH, self.epoch))
            probes = [self.strings.random_string(rng) for _ in range(PROBES)]
            accuracies = [self.accuracy(probe, search) for probe in probes]
            return {"search_accuracy": sum(accuracies) / PROBES, "entropy": self.strings.entropy}
        top = evolve(
            self.strings,
            lambda string: self.recalibrated_accuracy(string, search),
            lambda string: self.limits.allow(self.space.decode(string)),
            self.settings,
            random.Random(self.problem.seed_of(EVOLUTION)),
            seeds=self.seeds(),
        )
        self.found = top[0][0]
        return {
            "search_accuracy": top[0][1],
            "entropy": self.strings.entropy,
            "top_accuracies": [accuracy for _, accuracy in top],
        }

    def seeds(self) -> Sequence[String]:
        """Architectures that the first population starts with: none, it is random."""
        return ()

    def accuracy(self, string: String, search: Iterable[Batch]) -> float:
        """On the search half, with the statistics of each batch."""
        return shared_accuracy(self.supernet, self.space.decode(string), first(search, self.settings.score_batches))

    def recalibrated_accuracy(self, string: String, search: Iterable[Batch]) -> float:
        """On the search half, with running statistics taken anew on the last training batches."""
        path = self.space.decode(string)
        recalibrate(self.supernet, lambda x: self.supernet(x, path), self.recent)
        scored = first(search, self.settings.score_batches)
        return evaluate(lambda x: self.supernet(x, path), scored)["accuracy"]

    def derive(self) -> Genotype:
        """The best architecture of the evolution; before it, a random one."""
        string = self.found or self.strings.random_string(random.Random(self.problem.seed))
        return self.space.decode(string, rule="evolution" if self.found else "random")

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"found": self.found}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.found = state["found"]
