"""One-Shot (Bender et al. 2018): a network that holds all paths, trained with path dropout, ranks architectures.

Each ghost batch drops paths of its own, the same in all cells. Of the k paths that lead into an operation each is
dropped with probability t r^(1/k), where t rises linearly from 0 to 1 over the training (section 3.2). The L2 penalty
of a weight counts as far as its path is kept. No architecture parameter is learnt: after training, architectures are
drawn from a fixed distribution and ranked by their accuracy with the shared weights, on batch statistics (section 3.3).
The search ends with the best of a few; `python -m fastnas.rank` ranks thousands.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastnas import distributed, processes
from fastnas.config import option
from fastnas.engine.choice_blocks import GHOST, ChoiceBlockNetwork, PathMasks
from fastnas.engine.training import Batch, accuracy, assign_gradients, first
from fastnas.errors import UserError
from fastnas.methods.base import Checkpointed, Figure, Problem, set_weight_rate
from fastnas.spaces.architecture import ArchitectureString

STEP, EPOCH, FINAL = 1, 2, 3  # streams of random numbers
PROBES = 3  # random architectures whose mean accuracy shows how the weights come on
REFERENCE_RATE = 1e-8  # r of the architectures that have nearly all paths (section 5)


@dataclass(frozen=True)
class OneShotSettings:
    """The paper's (sections 3.2 and 4.1)."""

    dropout_rate: float = option(
        0.1, "r: probability that all paths into an operation are dropped, at the end", minimum=0, maximum=0.999
    )
    dropout_ramp: bool = option(True, "let the dropout of paths rise linearly from 0; off: constant")
    ghost_batch: int = option(GHOST, "images that share the dropped paths and the batch statistics", minimum=2)
    candidates: int = option(100, "random architectures of which the search's last epoch takes the best", minimum=1)


class OneShot(Checkpointed):
    """See the module's docstring."""

    name: ClassVar[str] = "one_shot"
    Settings: ClassVar[type] = OneShotSettings
    parts: ClassVar[tuple[str, ...]] = ("supernet", "weight_optimizer")
    graph_steps: ClassVar[str] = "other paths are dropped at every step"

    def __init__(self, settings: OneShotSettings, problem: Problem) -> None:
        weights = problem.weights
        if weights.batch_size % (settings.ghost_batch * processes.world_size()):
            each = f" on each of {processes.world_size()} processes" if processes.world_size() > 1 else ""
            raise UserError(
                f"a batch of {weights.batch_size} images cannot be cut into ghost batches of {settings.ghost_batch}"
                f"{each}: give another --batch-size or --ghost-batch"
            )
        self.settings, self.weights, self.problem = settings, weights, problem
        self.space = problem.space
        self.supernet: ChoiceBlockNetwork = problem.supernet(ghost=settings.ghost_batch)
        # Weight decay is added per path, see `step`.
        self.weight_optimizer = torch.optim.SGD(
            self.supernet.parameters(), weights.lr, weights.momentum, nesterov=weights.momentum > 0
        )
        self.found: tuple[int, ...] | None = None

    def start_epoch(self, epoch: int) -> None:
        self.supernet.train()
        self.epoch = epoch
        set_weight_rate(self.weight_optimizer, self.weights, epoch)

    @property
    def ramp(self) -> float:
        """t of this epoch: 0 in the first one, 1 in the last."""
        return self.epoch / max(1, self.weights.epochs - 1) if self.settings.dropout_ramp else 1.0

    def masks(self, index: int) -> PathMasks:
        """The paths that the ghost batches of step `index` keep."""
        groups = self.weights.batch_size // self.settings.ghost_batch
        seed = self.problem.seed_of(STEP, index)
        return PathMasks.sample(self.space, self.settings.dropout_rate, self.ramp, groups, seed)

    def step(self, index: int, train: Batch, search: Batch) -> dict[str, Tensor]:
        """One SGD step: cross-entropy, and the L2 penalty of active paths."""
        x, y = train
        masks = self.masks(index)
        logits = self.supernet(x, masks.part(**processes.share()))
        loss = F.cross_entropy(logits, y)
        parameters, shares = zip(*self.supernet.usage(masks), strict=True)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        assign_gradients(parameters, with_penalty(gradients, parameters, shares, self.weights.weight_decay))
        torch.nn.utils.clip_grad_norm_(parameters, self.weights.grad_clip)
        self.weight_optimizer.step()
        return {"loss": loss.detach(), "accuracy": accuracy(logits.detach(), y)}

    def end_epoch(self, search: Iterable[Batch]) -> dict[str, Figure]:
        """Mean accuracy of a few random architectures; after the last epoch that of the best of `candidates`."""
        self.supernet.eval()
        last = self.epoch == self.weights.epochs - 1
        stream, count = (FINAL, self.settings.candidates) if last else (EPOCH, PROBES)
        rng = random.Random(self.problem.seed_of(stream, self.epoch))
        drawn = [self.space.random_genotype(rng) for _ in range(count)]
        accuracies = score(self.supernet, drawn, search)
        figures: dict[str, Figure] = {
            "search_accuracy": sum(accuracies) / count,
            "entropy": sum(map(math.log, self.space.choices)),  # of the distribution that they are drawn from
        }
        if last:
            best = max(range(count), key=lambda index: accuracies[index])
            self.found = drawn[best].string
            figures |= {"search_accuracy": accuracies[best], "candidate_accuracy": figures["search_accuracy"]}
        return figures

    def derive(self) -> ArchitectureString:
        """The best architecture; before the last epoch has ended, a random one."""
        if self.found is not None:
            return self.space.decode(self.found, rule="best of random")
        return self.space.random_genotype(random.Random(self.problem.seed))

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"found": self.found}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.found = None if state["found"] is None else tuple(state["found"])


def with_penalty(
    gradients: Sequence[Tensor | None], parameters: Sequence[Tensor], shares: Sequence[float], decay: float
) -> list[Tensor | None]:
    """Gradients of loss + decay / 2 * sum_p share_p |w_p|^2; a parameter whose path nobody kept has none at all.

    One whose path was kept and led nowhere has the penalty's alone, so that all processes have the same set.
    """
    return [
        None if not share else decay * share * parameter.detach() + (0.0 if gradient is None else gradient)
        for gradient, parameter, share in zip(gradients, parameters, shares, strict=True)
    ]


@torch.inference_mode()
def score(
    network: ChoiceBlockNetwork,
    architectures: Sequence[ArchitectureString],
    search: Iterable[Batch],
    batches: int | None = None,
) -> list[float]:
    """Accuracy of each architecture with the shared weights. The stem runs once for all of them."""
    correct = torch.zeros(len(architectures), device=network.stem.weight.device)
    count = 0
    for x, y in first(search, batches):
        stem = network.stem(x)
        for index, architecture in enumerate(architectures):
            correct[index] += (network.after_stem(stem, architecture).argmax(-1) == y).sum()
        count += len(y)
    correct, count = distributed.total(correct), distributed.total(torch.tensor(count))
    return (correct / count).tolist()


@torch.inference_mode()
def reference_log_probabilities(network: ChoiceBlockNetwork, x: Tensor, references: int, seed: int) -> list[Tensor]:
    """log p(class) on images [B, C, H, W] by `references` architectures with nearly all paths: [B, classes] each."""
    return [
        network(x, PathMasks.sample(network.space, REFERENCE_RATE, 1.0, 1, seed + index)).log_softmax(-1)
        for index in range(references)
    ]


def symmetric_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """D(p || q) + D(q || p) of each row: [B, classes] twice -> [B], in nats (section 5)."""
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)
