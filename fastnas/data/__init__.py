"""Data sets: loaded once, split in three by a seed, served as batches that depend on the step only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from fastnas.data.augment import Recipe
from fastnas.data.named import NAMES, find
from fastnas.data.seeds import Use
from fastnas.data.splits import count_classes, stratified
from fastnas.data.stream import Split, Stream
from fastnas.errors import UserError

__all__ = ["NAMES", "Data", "Split", "Stream", "load"]


@dataclass(frozen=True)
class Data:
    """A data set and its splits. `train` and `search` are disjoint parts of the training set and
    `train_and_search` is all of it; `test` shares nothing with them. mean and std: per channel, for pixels
    scaled to 0..1."""

    name: str
    num_classes: int
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    train: Split
    search: Split
    train_and_search: Split
    test: Split

    @property
    def train_size(self) -> int:
        """Images in `train`."""
        return len(self.train)

    @property
    def search_size(self) -> int:
        """Images in `search`."""
        return len(self.search)

    @property
    def test_size(self) -> int:
        """Images in `test`."""
        return len(self.test)


def load(
    spec: str,
    data_dir: str | Path | None = None,
    *,
    seed: int = 0,
    search_fraction: float = 0.5,
    train_fraction: float | None = None,
    device: str | torch.device = "cpu",
    download: bool = False,
    image_size: int | None = None,
    cutout: int = 0,
    workers: int = 2,
    num_classes: int | None = None,
    flip: bool | None = None,
) -> Data:
    """Load the data set `spec`, one of NAMES.

    data_dir: folder of cifar10, cifar100, fashion-mnist and imagenet (default: data). seed: of the split
    between train and search, and of the order and augmentation of batches; the test set does not depend on
    it. search_fraction: share of the training set that goes to `search`, 0 <= f < 1. train_fraction:
    share of it that goes to `train`, of every class alike (default: all that `search` leaves). image_size: side to
    resize to. cutout: side of the blanked square, 0 for none. workers: processes (threads, for small folders)
    that read image files. num_classes: outputs of the classifier, if more than the labels show. flip: whether
    training images are mirrored at random (default: yes, except digits).

    Raises UserError, in one sentence, for anything wrong with the arguments or the files.
    """
    if not 0 <= search_fraction < 1:
        raise UserError(f"search fraction {search_fraction} is out of range: it must be at least 0 and below 1")
    for name, value, least in (("image size", image_size, 1), ("cutout", cutout, 0), ("workers", workers, 0)):
        if value is not None and value < least:
            raise UserError(f"{name} {value} is too small: it must be at least {least}")

    if train_fraction is not None and not 0 < train_fraction <= 1 - search_fraction + 1e-9:
        raise UserError(
            f"train fraction {train_fraction} is out of range: with a search fraction of {search_fraction} it must be "
            f"above 0 and at most {1 - search_fraction:g}"
        )

    source = find(spec, data_dir, download)
    classes = count_classes(source.name, source.labels, source.test_labels, num_classes)
    size = source.side() if image_size is None else image_size
    if cutout > size:
        raise UserError(f"cutout {cutout} is larger than the images ({size} x {size}): it must be at most {size}")
    train_store, test_store, (mean, std) = source.stores(size, torch.device(device), workers)

    # As the usual 4 pixels on each side of CIFAR's 32.
    recipe = Recipe(mean, std, pad=size // 8, flip=source.flip if flip is None else flip, cutout=cutout)
    train_rows, search_rows = stratified(source.labels, search_fraction, Use.SEARCH_SPLIT, seed)
    if train_fraction is not None:
        share = min(1.0, train_fraction / (1 - search_fraction))
        _, part = stratified(source.labels[train_rows], share, Use.TRAIN_SUBSET, seed)
        train_rows = train_rows[part]
    all_rows, test_rows = torch.arange(len(source.labels)), torch.arange(len(source.test_labels))
    return Data(
        name=spec,
        num_classes=classes,
        channels=len(mean),
        image_size=size,
        mean=mean,
        std=std,
        train=Split(f"the training part of {source.name}", train_store, train_rows, recipe, (seed, 0)),
        search=Split(f"the search part of {source.name}", train_store, search_rows, recipe, (seed, 1)),
        train_and_search=Split(f"the training set of {source.name}", train_store, all_rows, recipe, (seed, 2)),
        test=Split(f"the test set of {source.name}", test_store, test_rows, recipe, (seed, 3)),
    )
