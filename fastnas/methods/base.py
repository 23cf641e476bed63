"""What a search method is to the search loop."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnas.config import option
from fastnas.engine.choice_blocks import GHOST
from fastnas.engine.mixture import Mixture
from fastnas.engine.networks import build_supernet
from fastnas.engine.stems import STEMS
from fastnas.engine.supernet import EXECUTORS, STORAGE, Supernet
from fastnas.engine.training import (
    Batch,
    accuracy,
    assign_gradients,
    batch_statistics,
    evaluate,
    learning_rate,
    set_learning_rate,
)
from fastnas.errors import UserError
from fastnas.spaces import AnyGenotype, AnySpace

Figure = float | list[float] | list[list[float]]  # a number, or one for each edge, or a row for each edge


@dataclass(frozen=True)
class WeightSettings:
    """How the network is built and its weights are trained; the defaults are those of DARTS on CIFAR-10."""

    epochs: int = option(50, "passes over the training half of the data", minimum=1)
    batch_size: int = option(64, "images a step; auto: the largest batch that fits", minimum=2)
    channels: int = option(16, "channels of the first cells' nodes; doubled at each reduction cell", minimum=2)
    cells: int = option(8, "cells of the network that searches; with fewer than 3 there is no normal cell", minimum=3)
    nodes: int = option(4, "intermediate nodes of a cell", minimum=2, maximum=16)
    stem: str = option("cifar", "layers before the first cell: full size, or three strides of 2", choices=STEMS)
    executor: str = option(
        "fused",
        "how cells run; fused: a few kernels a cell; lean: fused, keeping as little memory as possible and computing "
        "more; plain: one PyTorch module a candidate",
        choices=EXECUTORS,
    )
    storage: str = option(
        "float32",
        "what the executors fused and lean keep their maps in, on a GPU; bfloat16: half the memory and traffic, with "
        "sums, statistics and parameters in float32",
        choices=tuple(STORAGE),
    )
    lr: float = option(0.025, "learning rate of the weights at the start", above=0)
    lr_min: float = option(0.001, "learning rate that the cosine schedule ends at", minimum=0)
    lr_warmup_epochs: int = option(0, "epochs in which the rate rises linearly before the cosine", minimum=0)
    momentum: float = option(0.9, "momentum of the weights' SGD", minimum=0, maximum=1)
    weight_decay: float = option(3e-4, "L2 penalty of the weights", minimum=0)
    grad_clip: float = option(5.0, "largest norm of the weights' gradient; alphas are never clipped", above=0)


@dataclass(frozen=True)
class Problem:
    """What to search on: the space, the images' shape, where to run, and how weights are trained."""

    space: AnySpace
    classes: int
    in_channels: int
    weights: WeightSettings
    device: torch.device
    seed: int
    image_size: int = 32  # pixels a side, for counting operations

    def seed_of(self, *stream: int) -> int:
        """A number below 2^63 that depends on the seed and the numbers in `stream` alone: resuming needs no state."""
        mixed = self.seed
        for number in stream:
            mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % 2**63
        return mixed

    def generator(self, *stream: int) -> torch.Generator:
        """A CPU generator with that seed."""
        return torch.Generator().manual_seed(self.seed_of(*stream))

    def supernet(self, *, k: int = 1, ghost: int = GHOST, auxiliary: bool = False) -> nn.Module:
        """A new supernet of this problem, on its device; `k`: partial channels 1/k, `ghost`: images of a ghost
        batch, `auxiliary`: with an auxiliary head."""
        return build_supernet(
            self.space,
            channels=self.weights.channels,
            cells=self.weights.cells,
            classes=self.classes,
            in_channels=self.in_channels,
            k=k,
            ghost=ghost,
            stem=self.weights.stem,
            executor=self.weights.executor,
            storage=self.weights.storage,
            auxiliary=auxiliary,
        ).to(self.device)


def trained_together(supernet: nn.Module) -> list[nn.Parameter]:
    """The shared weights of a method that trains all candidates at once: few long leaves where the supernet can lay
    them flat."""
    return supernet.lay_flat() if isinstance(supernet, Supernet) else list(supernet.parameters())


def weight_optimizer(parameters: Iterable[nn.Parameter], weights: WeightSettings) -> torch.optim.SGD:
    """SGD with momentum and weight decay for the shared weights."""
    # Not fused=True: that one cannot start some momentum buffers later than others, as sampled paths need it.
    return torch.optim.SGD(parameters, weights.lr, weights.momentum, weight_decay=weights.weight_decay, foreach=True)


def set_weight_rate(optimizer: torch.optim.Optimizer, weights: WeightSettings, epoch: int) -> None:
    """The weights' learning rate for `epoch`, counted from 0: the linear warm-up, if any, times the cosine."""
    rate = learning_rate(epoch, weights.epochs, weights.lr, weights.lr_min, warmup=weights.lr_warmup_epochs)
    set_learning_rate(optimizer, rate)


def train_weights(
    supernet: nn.Module,
    architecture: Mixture | AnyGenotype,
    train: Batch,
    optimizer: torch.optim.Optimizer,
    grad_clip: float,
) -> dict[str, Tensor]:
    """One SGD step on the shared weights with the architecture as a constant; loss and accuracy of the batch.

    An operation that took no part has no gradient, so it sees neither weight decay nor momentum.
    """
    x, y = train
    logits = supernet(x, architecture)
    loss = F.cross_entropy(logits, y)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assign_gradients(parameters, torch.autograd.grad(loss, parameters, allow_unused=True))
    torch.nn.utils.clip_grad_norm_(parameters, grad_clip)
    optimizer.step()
    return {"loss": loss.detach(), "accuracy": accuracy(logits.detach(), y)}


def shared_accuracy(supernet: nn.Module, architecture: Mixture | AnyGenotype, batches: Iterable[Batch]) -> float:
    """Accuracy of an architecture with the shared weights, by the statistics of each batch; leaves no trace in them."""
    with batch_statistics(supernet):
        return evaluate(lambda x: supernet(x, architecture), batches)["accuracy"]


def edge_figures(normal: Tensor, reduce: Tensor) -> dict[str, Figure]:
    """What metrics keep of an architecture: entropies in nats and, for the report, the probabilities themselves.

    `normal`, `reduce`: probabilities of the candidates of each edge, [E, O]; `reduce` may have no edges. The
    probabilities are kept to four digits.
    """
    figures: dict[str, Figure] = {}
    entropies = []
    for cell, probabilities in (("normal", normal.detach()), ("reduce", reduce.detach())):
        if len(probabilities):
            entropies.append(torch.special.entr(probabilities).sum(-1))
            figures[f"entropy_{cell}"] = float(entropies[-1].mean())
            figures[f"edge_entropy_{cell}"] = entropies[-1].tolist()
            figures[f"probabilities_{cell}"] = [[round(p, 4) for p in row] for row in probabilities.tolist()]
    return {"entropy": float(torch.cat(entropies).mean())} | figures


def check_betas(betas: tuple[float, ...]) -> None:
    """Adam's decay rates: two numbers from 0 up to, but not including, 1. Raises UserError otherwise."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"arch-betas must be two numbers of at least 0 and below 1, got {','.join(map(str, betas))}")


class Checkpointed:
    """A method whose state is that of its `parts`: modules and optimisers, by the names of its attributes."""

    parts: ClassVar[tuple[str, ...]]

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).state_dict() for name in self.parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """How an optimiser updates is not taken over: it depends on the device."""
        for name in self.parts:
            part, own = getattr(self, name), state[name]
            if isinstance(part, torch.optim.Optimizer):
                groups = [
                    saved | {key: group[key] for key in ("capturable", "foreach", "fused") if key in group}
                    for group, saved in zip(part.param_groups, own["param_groups"], strict=True)
                ]
                own = own | {"param_groups": [group | {"lr": float(group["lr"])} for group in groups]}
            part.load_state_dict(own)


class Method(Protocol):
    """A search method: weights and architecture, a step that trains both, and the genotype they amount to.

    `graph_steps`: functions that `step` calls and a CUDA graph can record (`fastnas.engine.graphs`), by name; or why
    there are none, as a line of the log says it.
    """

    name: ClassVar[str]
    Settings: ClassVar[type]
    graph_steps: tuple[str, ...] | str

    def __init__(self, settings: Any, problem: Problem) -> None: ...

    def start_epoch(self, epoch: int) -> None:
        """Set learning rates and phases for `epoch`, counted from 0."""

    def step(self, index: int, train: Batch, search: Batch) -> dict[str, Tensor]:
        """One search step, `index` counted over the whole search; 0-dim tensors to average, read by nobody here."""

    def end_epoch(self, search: Iterable[Batch]) -> dict[str, Figure]:
        """Figures of the epoch: at least `search_accuracy` and `entropy` (nats), measured on the search half.

        `search` is the whole search half in order, without augmentation; it may be gone through several times.
        """

    def derive(self) -> AnyGenotype:
        """The genotype of the current architecture parameters."""

    def state_dict(self) -> dict[str, Any]:
        """All that a bit-for-bit resume needs: tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
