"""Images in one numpy archive: `npz:PATH`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastnas._npz import read_arrays
from fastnas.data.source import Arrays
from fastnas.data.splits import hold_out
from fastnas.errors import UserError

MAX_CHANNELS = 4


def read_npz(path: Path) -> Arrays:
    """Read x_train, y_train, x_test, y_test, or x and y (then a fifth is held out for the test).

    x: uint8 [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 to 4 channels; y: integers [N]. Nothing in the
    file is unpickled. Raises UserError naming the file and the array for anything else.
    """
    arrays, names = _read_arrays(path)
    if {"x_train", "y_train", "x_test", "y_test"} <= arrays.keys():
        images, test_images = _images(path, "x_train", arrays), _images(path, "x_test", arrays)
        labels = _labels(path, "y_train", arrays, len(images))
        test_labels = _labels(path, "y_test", arrays, len(test_images))
        if images.shape[1:] != test_images.shape[1:]:
            raise UserError(
                f"{path}: x_train has images of shape {_shape(images)} (channels, height, width) "
                f"but x_test of {_shape(test_images)}: they must be alike"
            )
        return Arrays(f"npz file {path}", images, labels, test_images, test_labels)
    if {"x", "y"} <= arrays.keys():
        images = _images(path, "x", arrays)
        labels = _labels(path, "y", arrays, len(images))
        rest, test = hold_out(labels)
        return Arrays(f"npz file {path}", images[rest], labels[rest], images[test], labels[test])
    raise UserError(f"{path} needs the arrays x_train, y_train, x_test and y_test, or x and y (it holds {names})")


def _read_arrays(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """The arrays with a known name, and the names of all that are there. Others are not read."""
    if not path.is_file():
        raise UserError(f"no file {path}: check the path after npz:")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        arrays, names = read_arrays(path, ("x_train", "y_train", "x_test", "y_test", "x", "y"), limit=memory)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"cannot read {path}: {reason}; write it with numpy.savez from plain arrays") from error
    return arrays, ", ".join(names) or "none"


def _images(path: Path, name: str, arrays: dict[str, np.ndarray]) -> Tensor:
    """uint8 [N, C, H, W]."""
    array = arrays[name]
    if array.dtype != np.uint8:
        raise UserError(f"{path}: {name} is {array.dtype}, but images must be uint8 with values 0 to 255")
    if array.ndim not in (3, 4) or 0 in array.shape[1:]:
        raise UserError(
            f"{path}: {name} has shape {array.shape}, but images must be [N, H, W], [N, H, W, C] or [N, C, H, W]"
        )
    if array.ndim == 3:
        array = array[:, None]
    else:
        first, last = array.shape[1] <= MAX_CHANNELS, array.shape[3] <= MAX_CHANNELS
        if first == last:
            raise UserError(
                f"{path}: cannot tell which axis of {name} (shape {array.shape}) is the channels: "
                f"exactly one of axes 1 and 3 must be {MAX_CHANNELS} or smaller"
            )
        if last:
            array = array.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.ascontiguousarray(array))


def _labels(path: Path, name: str, arrays: dict[str, np.ndarray], rows: int) -> Tensor:
    """int64 [N]."""
    array = arrays[name]
    if array.dtype.kind not in "iu":
        raise UserError(f"{path}: {name} is {array.dtype}, but labels must be integers")
    if array.shape != (rows,):
        raise UserError(f"{path}: {name} has shape {array.shape}, but there are {rows} images: it must be ({rows},)")
    return torch.from_numpy(array.astype(np.int64))


def _shape(images: Tensor) -> tuple[int, ...]:
    return tuple(images.shape[1:])
