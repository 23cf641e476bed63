"""Folders of images in ImageFolder's layout: `folder:PATH` and `imagenet`."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastnas.data.source import Arrays, Statistics
from fastnas.data.splits import hold_out
from fastnas.data.stream import Store
from fastnas.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp")
DEFAULT_SIDE = 224
RESIDENT_LIMIT = 512 * 2**20  # bytes of uint8 pixels, training and test together

# Mean and standard deviation of ImageNet's training set as torchvision publishes them; the usual choice for
# photographs.
IMAGENET_STATISTICS: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Files:
    """A data set of image files, read as RGB. paths belong to labels, test_paths to test_labels."""

    name: str
    paths: Sequence[str]
    labels: Tensor
    test_paths: Sequence[str]
    test_labels: Tensor
    flip: bool = True

    def side(self) -> int:
        """See Source.side."""
        return DEFAULT_SIDE

    def stores(self, size: int, device: torch.device, workers: int) -> tuple[Store, Store, Statistics]:
        """See Source.stores. Decodes all images now if RESIDENT_LIMIT is enough, else streams them."""
        if 3 * size * size * (len(self.paths) + len(self.test_paths)) <= RESIDENT_LIMIT:
            images, test_images = decode(self.paths, size, workers), decode(self.test_paths, size, workers)
            return Arrays(self.name, images, self.labels, test_images, self.test_labels).stores(size, device, workers)
        try:
            from fastnas.data.streamed import Streamed
        except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
            raise UserError(
                f"{self.name} is too large to hold in memory, and streaming it needs a torchvision that fits "
                f"this torch ({error}): pip install torchvision"
            ) from error

        train = Streamed(self.paths, self.labels, size, device, workers)
        test = Streamed(self.test_paths, self.test_labels, size, device, workers)
        return train, test, IMAGENET_STATISTICS


def read_folder(root: Path) -> Files:
    """List PATH/train/CLASS/* with PATH/test/CLASS/* (or PATH/val/CLASS/*), or PATH/CLASS/*, or
    PATH/train/CLASS/* alone; in the last two a fifth is held out for the test.

    Classes are the folders of the training part in alphabetical order. Raises UserError for a missing folder,
    no classes, a class without training images, or a test class that is not in the training part.
    """
    if not root.is_dir():
        raise UserError(f"no folder {root}: check the path")
    name = f"folder {root}"
    train = root / "train" if (root / "train").is_dir() else root
    classes = _subfolders(train)
    if not classes:
        raise UserError(f"no class folders in {train}: expected {train}/CLASS/*.jpg, one folder a class")
    paths, labels = _list_files(train, classes)
    counts = torch.bincount(labels, minlength=len(classes))
    if (counts == 0).any():
        empty = train / classes[int(counts.argmin())]
        raise UserError(f"no images in {empty}: add some ({', '.join(EXTENSIONS)}) or remove the folder")
    # Folders without classes do not count: ImageNet's test images have no labels.
    parts = [root / part for part in ("test", "val") if train != root and (root / part).is_dir()]
    test = next((part for part in parts if _subfolders(part)), None)
    if test is None:
        rest, held = hold_out(labels)
        return Files(name, [paths[i] for i in rest], labels[rest], [paths[i] for i in held], labels[held])
    unknown = sorted(set(_subfolders(test)) - set(classes))
    if unknown:
        raise UserError(f"{test} has the class {unknown[0]}, which {train} has not: remove it, or add training images")
    test_paths, test_labels = _list_files(test, classes)
    return Files(name, paths, labels, test_paths, test_labels)


def decode(paths: Sequence[str], size: int, workers: int) -> Tensor:
    """Read files as uint8 [N, 3, size, size]: the largest centred square, resized bilinearly.

    With `workers` threads, which do run side by side, because Pillow gives up the interpreter lock.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise UserError("image files are read with Pillow, which is not installed: pip install pillow") from error

    images = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)

    def read(row: int) -> None:
        image = ImageOps.fit(read_image(paths[row]), (size, size), Image.Resampling.BILINEAR)
        images[row] = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        for _ in pool.map(read, range(len(paths))):
            pass
    return images


def read_image(path: str) -> Image:
    """One file as RGB; raises UserError naming it when it cannot be decoded."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            # Through RGBA, else a palette with transparency makes Pillow warn.
            return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the image {path} ({error}): repair it or remove it") from error


def _subfolders(root: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def _list_files(root: Path, classes: Sequence[str]) -> tuple[list[str], Tensor]:
    """(paths, int64 labels) of all images below root/CLASS, at any depth, in sorted order."""
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = [
            os.path.join(folder, file)
            for folder, _, files in os.walk(root / name, followlinks=True)
            for file in files
            if file.lower().endswith(EXTENSIONS) and not file.startswith(".")
        ]
        paths += sorted(found)
        labels += [label] * len(found)
    return paths, torch.tensor(labels, dtype=torch.int64)
