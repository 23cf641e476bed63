"""One function a named data set: each returns its images and labels, unsplit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastnas.data.folder import read_folder
from fastnas.data.npz import read_npz
from fastnas.data.source import Arrays, Source, Statistics
from fastnas.data.splits import hold_out
from fastnas.errors import UserError, did_you_mean

NAMES: dict[str, str] = {
    "digits": "1,797 scans of handwritten digits, 8 x 8, grey; comes with scikit-learn, needs no files",
    "cifar10": "CIFAR-10 in --data-dir: 60,000 photographs, 32 x 32, 10 classes",
    "cifar100": "CIFAR-100 in --data-dir: the same with 100 classes",
    "fashion-mnist": "Fashion-MNIST in --data-dir: 70,000 pictures of clothes, 28 x 28, grey, 10 classes",
    "imagenet": "train/CLASS/* and val/CLASS/* in --data-dir, at --image-size (224)",
    "folder:PATH": "your own images: PATH/CLASS/*.jpg, or PATH/train/CLASS/*.jpg and PATH/test/CLASS/*.jpg",
    "npz:PATH": "your own arrays: x_train, y_train, x_test, y_test (or x, y) in one .npz file",
}

# Of the 50,000 training images; torchvision's and most papers' values, confirmed on the original files for
# CIFAR-10.
_CIFAR10: Statistics = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
_CIFAR100: Statistics = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


def find(spec: str, data_dir: str | Path | None, download: bool) -> Source:
    """The data set that `spec` names; raises UserError when there is none or its files are missing."""
    kind, _, path = spec.partition(":")
    root = Path("data" if data_dir is None else data_dir).expanduser()
    if kind in ("folder", "npz") and not path:
        raise UserError(f"{kind}: needs a path after the colon, as in {kind}:my/images")
    if kind == "folder":
        return read_folder(Path(path).expanduser())
    if kind == "npz":
        return read_npz(Path(path).expanduser())
    if spec in _NAMED:
        return _NAMED[spec](root, download)
    if Path(spec).expanduser().exists():
        kind = "folder" if Path(spec).expanduser().is_dir() else "npz"
        raise UserError(f"unknown data set {spec!r}: for your own files write {kind}:{spec}")
    raise UserError(f"unknown data set {spec!r}{did_you_mean(spec, _NAMED)} (known: {', '.join(NAMES)})")


def digits(root: Path, download: bool) -> Arrays:
    """scikit-learn's copy of the UCI optical digits, levels 0..16 stretched to 0..255; a fifth is held out
    for the test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("digits comes with scikit-learn, which is not installed: pip install scikit-learn") from error
    pixels, target = load_digits(return_X_y=True)
    images = torch.from_numpy(np.rint(pixels * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    labels = torch.from_numpy(target.astype(np.int64))
    rest, test = hold_out(labels)
    return Arrays("digits", images[rest], labels[rest], images[test], labels[test], flip=False)


def cifar10(root: Path, download: bool) -> Arrays:
    """`root`/cifar-10-batches-py."""
    return _torchvision("cifar10", "CIFAR10", "cifar-10-batches-py", root, download, _CIFAR10)


def cifar100(root: Path, download: bool) -> Arrays:
    """`root`/cifar-100-python."""
    return _torchvision("cifar100", "CIFAR100", "cifar-100-python", root, download, _CIFAR100)


def fashion_mnist(root: Path, download: bool) -> Arrays:
    """`root`/FashionMNIST/raw."""
    return _torchvision("fashion-mnist", "FashionMNIST", "FashionMNIST/raw", root, download, None)


def imagenet(root: Path, download: bool) -> Source:
    """`root`/train and `root`/val."""
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise UserError(
                f"imagenet was not found in {root} (looked for {root / part}): "
                "point --data-dir at the folder that holds train/ and val/ (it cannot be downloaded)"
            )
    return read_folder(root)


def _torchvision(
    name: str, class_name: str, folder: str, root: Path, download: bool, statistics: Statistics | None
) -> Arrays:
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise UserError(
            f"{name} needs a torchvision that fits this torch ({error}): pip install torchvision"
        ) from error
    make: Callable[..., Any] = getattr(datasets, class_name)
    try:
        train, test = (make(str(root), train=part, download=download) for part in (True, False))
    except (RuntimeError, OSError, EOFError, ValueError, AssertionError) as error:
        if download:
            raise UserError(f"{name} could not be downloaded to {root}: {error}") from error
        state = "is damaged or incomplete" if (root / folder).is_dir() else "was not found"
        raise UserError(
            f"{name} {state} in {root} (looked for {root / folder}): "
            "point --data-dir at the folder that holds it, or add --download"
        ) from error
    images, test_images = (_channels_first(part.data) for part in (train, test))
    labels, test_labels = (torch.as_tensor(part.targets, dtype=torch.int64) for part in (train, test))
    return Arrays(name, images, labels, test_images, test_labels, statistics=statistics)


def _channels_first(data: np.ndarray | torch.Tensor) -> torch.Tensor:
    """[N, H, W, C] or [N, H, W] to uint8 [N, C, H, W]."""
    images = torch.as_tensor(data)
    return images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()


_NAMED: dict[str, Callable[[Path, bool], Source]] = {
    "digits": digits,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "fashion-mnist": fashion_mnist,
    "imagenet": imagenet,
}
