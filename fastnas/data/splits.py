"""Seeded, stratified splits of a list of labels, and the checks on labels and batch sizes."""

from __future__ import annotations

import torch
from torch import Tensor

from fastnas.data.seeds import Use, generator
from fastnas.errors import UserError

TEST_FRACTION = 0.2


def stratified(labels: Tensor, fraction: float, *seed: int) -> tuple[Tensor, Tensor]:
    """Split the rows of `labels` (int64 [N]) into (rest, part), two sorted int64 index tensors.

    `part` has round(fraction * N) rows and, of every class, its share rounded up or down. The two are
    disjoint and cover all rows.
    """
    size = len(labels)
    shuffled = torch.randperm(size, generator=generator(*seed))
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
    count = round(fraction * size)
    # Every (1/fraction)-th place of the class-sorted list, in integers: no class is off by a whole row.
    place = torch.arange(size)
    taken = (place + 1) * count // max(size, 1) > place * count // max(size, 1)
    return by_class[~taken].sort().values, by_class[taken].sort().values


def hold_out(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(training rows, test rows) for a data set without a test set of its own.

    The seed is a constant: runs with different seeds share one test set, so a genotype found with one seed
    and retrained with another has never met its test images.
    """
    return stratified(labels, TEST_FRACTION, Use.TEST_SPLIT)


def count_classes(name: str, labels: Tensor, test_labels: Tensor, num_classes: int | None) -> int:
    """The number of classes: `num_classes` when given, else the largest label plus one.

    Raises UserError for a data set without images, a negative label, fewer than two classes, or a label that
    does not fit into `num_classes`.
    """
    for part, values in (("training", labels), ("test", test_labels)):
        if len(values) == 0:
            raise UserError(f"{name} has no {part} images: add some, or choose another data set")
    both = torch.cat([labels, test_labels])
    lowest, highest = int(both.min()), int(both.max())
    if lowest < 0:
        raise UserError(f"{name} has the label {lowest}: labels must run from 0 to the number of classes minus 1")
    if num_classes is not None and highest >= num_classes:
        raise UserError(
            f"labels of {name} go up to {highest} but --num-classes is {num_classes}: "
            f"give at least {highest + 1}, or leave it out"
        )
    if highest < 1:
        raise UserError(f"{name} has only one class: a search needs at least two")
    return highest + 1 if num_classes is None else num_classes


def check_batch_size(batch_size: int, rows: int, name: str, world_size: int = 1, whole: bool = True) -> None:
    """Raise UserError unless `rows` images give batches of `batch_size` that `world_size` ranks can share.

    whole: whether the split must hold a whole batch (training), or a smaller one will do (evaluation).
    """
    if batch_size < 1:
        raise UserError(f"batch size {batch_size} is too small: it must be at least 1")
    if rows == 0:
        raise UserError(f"{name} is empty: change --search-fraction, or give more images")
    if whole and batch_size > rows:
        raise UserError(
            f"batch size {batch_size} is larger than {name} ({rows} images): the largest that works is {rows}"
        )
    if batch_size % world_size:
        raise UserError(
            f"batch size {batch_size} cannot be shared equally by {world_size} processes: "
            f"use a multiple of {world_size}"
        )
    if whole and world_size > 1 and batch_size < 2 * world_size:
        raise UserError(
            f"batch size {batch_size} leaves each of {world_size} processes one image, and batch normalisation needs "
            f"two: use at least {2 * world_size}"
        )
