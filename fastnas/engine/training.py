"""The pieces of a training step that every method and retraining share."""

from __future__ import annotations

import contextlib
import gc
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastnas import distributed, processes

Batch = tuple[Tensor, Tensor]
SCHEDULES = ("cosine", "linear")


def cosine(epoch: int, epochs: int, start: float, end: float) -> float:
    """Learning rate of `epoch` (from 0): cosine from `start` towards `end`, one value an epoch, no restart."""
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * epoch / epochs))


def learning_rate(
    epoch: int, epochs: int, start: float, end: float, *, schedule: str = "cosine", warmup: int = 0
) -> float:
    """Rate of `epoch`, from 0: falling from `start` towards `end` by `schedule`, one of SCHEDULES, times a linear rise
    over `warmup` epochs."""
    falling = cosine(epoch, epochs, start, end) if schedule == "cosine" else start + (end - start) * epoch / epochs
    return falling * min(1.0, (epoch + 1) / warmup) if warmup else falling


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):  # a recorded step reads it there
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


@contextlib.contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within the block none of them asks for a gradient, so none of their modules' inputs is kept for one."""
    asking = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """Within the block batch normalisation uses the batch's statistics, also in evaluation, and updates nothing.

    Sampled paths need it: the running statistics of a shared operation mix all the paths that led to it.
    """
    norms = [child for child in module.modules() if isinstance(child, nn.BatchNorm2d)]
    before = [(norm, norm.training, norm.track_running_stats) for norm in norms]
    for norm in norms:
        norm.train()
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm, training, tracks in before:
            norm.train(training)
            norm.track_running_stats = tracks


def recalibrate(module: nn.Module, run: Callable[[Tensor], Tensor], batches: Iterable[Batch]) -> None:
    """Set the running statistics of batch normalisation to the mean over `batches` of what `run` meets in them.

    A sampled path needs it before it is evaluated with running statistics (Guo et al. 2020). Those of operations
    that `run` leaves out are reset. Leaves `module` in evaluation mode.
    """
    norms = [child for child in module.modules() if isinstance(child, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean
    module.train()
    with torch.no_grad():
        for x, _ in batches:
            run(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    module.eval()
    distributed.average_statistics(module.state_dict())


@contextlib.contextmanager
def settled_heap() -> Iterator[None]:
    """Within the block Python's garbage collector leaves alone what was made before it.

    A step makes thousands of short-lived tensors, each collection would walk over all modules of the supernet.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def assign_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    """Set the gradients, averaged over the processes that train as one; None leaves a parameter untouched."""
    for parameter, gradient in zip(parameters, distributed.average(gradients), strict=True):
        parameter.grad = gradient


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average over the processes what `backward` has left; parameters without gradient must be the same on all."""
    assign_gradients(parameters, [parameter.grad for parameter in parameters])


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of right answers, as a tensor on the device: no host sync."""
    return (logits.argmax(-1) == labels).float().mean()


@torch.no_grad()
def evaluate(predict: Callable[[Tensor], Tensor], batches: Iterable[Batch]) -> dict[str, float]:
    """Mean cross-entropy and accuracy of `predict` over `batches`, those of all processes together.

    Raises ValueError when there is no batch.
    """
    loss = correct = count = torch.zeros(())
    for x, y in batches:
        logits = predict(x)
        loss = loss + F.cross_entropy(logits.float(), y, reduction="sum").cpu()
        correct = correct + (logits.argmax(-1) == y).sum().cpu()
        count = count + len(y)
    loss, correct, count = distributed.total(torch.stack([loss, correct, count])).unbind()
    if not count:
        raise ValueError("evaluate: there is no batch to evaluate on")
    return {"loss": float(loss / count), "accuracy": float(correct / count)}


def first(batches: Iterable[Batch], number: int | None) -> Iterator[Batch]:
    """The first `number` batches of a split that is dealt out to the processes; None takes all."""
    return islice(batches, None if number is None else len(range(processes.rank(), number, processes.world_size())))


class Means:
    """Means over an epoch's steps, and over the processes, summed on the device and read once; each over the steps that
    gave the figure."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: Counter[str] = Counter()

    def add(self, figures: Mapping[str, Tensor]) -> None:
        self.counts.update(figures.keys())
        for key, value in figures.items():
            self.sums[key] = self.sums[key] + value if key in self.sums else value.clone()

    def read(self) -> dict[str, float]:
        sums = distributed.average(list(self.sums.values()))
        return {key: float(value) / self.counts[key] for key, value in zip(self.sums, sums, strict=True)}
