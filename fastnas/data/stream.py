"""Splits and the endless, stateless streams of batches that are drawn from them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Protocol

import torch
from torch import Tensor

from fastnas.data.augment import Recipe, affine, cutout_, draw, normalise
from fastnas.data.seeds import Use, generator
from fastnas.data.splits import check_batch_size


@dataclass(frozen=True)
class Plan:
    """One batch before its pixels exist. rows: int64 [B] into the store; draws: int64 [6, B] (augment.draw),
    or None for a batch that is not augmented. Both on the CPU."""

    rows: Tensor
    draws: Tensor | None = None


class Store(Protocol):
    """Where images live: on the device (resident.py) or in files (folder.py)."""

    labels: Tensor  # int64 [N], on the CPU
    image_size: int
    device: torch.device

    def fetch(self, plans: Iterable[Plan], recipe: Recipe) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield (images, labels, draws) on the device for each plan: uint8 [B, C, H, W], cropped and flipped
        when the plan has draws; int64 [B]; int64 [6, B] or None."""
        ...

    def contents(self) -> Iterator[bytes | memoryview]:
        """What tells these images and labels from others, for a digest."""
        ...


class Split:
    """Some rows of a store. name: what errors call it. seed: what its random numbers start from."""

    def __init__(self, name: str, store: Store, rows: Tensor, recipe: Recipe, seed: tuple[int, ...]) -> None:
        self.name = name
        self.store = store
        self.rows = rows
        self.recipe = recipe
        self.seed = seed
        self._scale, self._shift = affine(recipe, store.device)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> Tensor:
        """int64 [len(self)], on the CPU, in the order of `batches`."""
        return self.store.labels[self.rows]

    def stream(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        augment: bool = True,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> Stream:
        """An endless stream of shuffled batches; see `Stream`.

        batch_size: images of a step over all ranks; rank r of `world_size` gets the r-th equal part of it.
        drop_last: whether an epoch ends with its last whole batch (needed for several ranks).

        Raises UserError for a batch size that is below 1, above the size of the split, or not divisible by
        `world_size`.
        """
        check_batch_size(batch_size, len(self), self.name, world_size)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in [0, {world_size}), got {rank}")
        if world_size > 1 and not drop_last:
            raise ValueError("drop_last=False cannot be shared equally by several ranks")
        return Stream(self, batch_size, seed, augment, drop_last, rank, world_size)

    def batches(self, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """One ordered pass without augmentation: (x, y) as in `Stream.from_step`, the last batch smaller.

        The whole batches are dealt out to `world_size` ranks in turn.
        Raises UserError for a batch size below 1 or an empty split.
        """
        check_batch_size(batch_size, len(self), self.name, whole=False)
        return self.fetch(Plan(rows) for rows in self.rows.split(batch_size)[rank::world_size])

    def fetch(self, plans: Iterable[Plan]) -> Iterator[tuple[Tensor, Tensor]]:
        """Finished batches: x float32 [B, C, H, W], normalised; y int64 [B]; both on the device."""
        for images, labels, draws in self.store.fetch(plans, self.recipe):
            x = normalise(images, self._scale, self._shift)
            if draws is not None and self.recipe.cutout:
                cutout_(x, draws, self.recipe.cutout)
            yield x, labels


class Stream:
    """Shuffled batches without end or state: a step's batch depends on the seeds, the split and the step.

    len(stream) is the number of steps of an epoch; each epoch goes through the split once, in its own order.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        seed: int,
        augment: bool,
        drop_last: bool,
        rank: int,
        world_size: int,
    ) -> None:
        self.split = split
        self.batch_size = batch_size
        self.augment = augment
        self._seed = (*split.seed, seed)
        self._steps = len(split) // batch_size if drop_last else -(-len(split) // batch_size)
        share = batch_size // world_size
        self._part = slice(rank * share, (rank + 1) * share)
        self._epoch, self._order = -1, torch.empty(0)

    def __len__(self) -> int:
        return self._steps

    def from_step(self, step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (x, y) of `step`, `step` + 1, ... for ever, on the device.

        x: float32 [B, C, H, W], normalised; y: int64 [B].
        """
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        return self.split.fetch(self.plan(i) for i in count(step))

    def plan(self, step: int) -> Plan:
        """The rows and random numbers of a step, this rank's part of them."""
        epoch, index = divmod(step, self._steps)
        if epoch != self._epoch:
            order = torch.randperm(len(self.split), generator=generator(Use.ORDER, *self._seed, epoch))
            self._epoch, self._order = epoch, self.split.rows[order]
        rows = self._order[index * self.batch_size : (index + 1) * self.batch_size]
        if not self.augment:
            return Plan(rows[self._part])
        # Drawn for the whole batch, so that the number of ranks does not change what happens to an image.
        random = generator(Use.DRAWS, *self._seed, step)
        draws = draw(len(rows), self.split.store.image_size, self.split.recipe, random)
        return Plan(rows[self._part], draws[:, self._part])
