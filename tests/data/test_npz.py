from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastnas.data import load
from fastnas.errors import UserError

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (60, 10, 10, 3), dtype=np.uint8)
Y = np.arange(60) % 3


def write(folder: Path, **arrays: Any) -> str:
    np.savez(folder / "set.npz", **arrays)
    return f"npz:{folder / 'set.npz'}"


@pytest.mark.parametrize(
    ("x", "channels"),
    [(X, 3), (np.ascontiguousarray(X.transpose(0, 3, 1, 2)), 3), (X[..., 0], 1), (X[..., :1], 1)],
    ids=["NHWC", "NCHW", "NHW", "NHW1"],
)
def test_layouts(tmp_path: Path, x: np.ndarray, channels: int) -> None:
    data = load(write(tmp_path, x_train=x[:40], y_train=Y[:40], x_test=x[40:], y_test=Y[40:]))
    assert (data.num_classes, data.channels, data.image_size, data.test_size) == (3, channels, 10, 20)
    expected = torch.from_numpy(X[40:, ..., :channels].transpose(0, 3, 1, 2).copy())
    assert torch.equal(data.test.store.images, expected)
    assert torch.equal(data.test.labels, torch.from_numpy(Y[40:]))


def test_plain_arrays_get_a_held_out_test(tmp_path: Path) -> None:
    data = load(write(tmp_path, x=X, y=Y.astype(np.uint8)), search_fraction=0.25)
    assert (data.train_size, data.search_size, data.test_size) == (36, 12, 12)
    assert torch.equal(torch.bincount(data.test.labels), torch.tensor([4, 4, 4]))


def test_images_that_are_not_square_need_a_size(tmp_path: Path) -> None:
    spec = write(tmp_path, x=X[:, :8], y=Y)
    with pytest.raises(UserError, match="8 x 10 pixels: give --image-size"):
        load(spec)
    assert next(load(spec, image_size=6).test.batches(4))[0].shape == (4, 3, 6, 6)


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "object images": ({"x": np.array([{"a": 1}] * 60, dtype=object), "y": Y}, "cannot read .*Object arrays"),
    "float images": ({"x": X / 255, "y": Y}, "x is float64, but images must be uint8"),
    "flat images": ({"x": X.reshape(60, -1), "y": Y}, r"x has shape \(60, 300\)"),
    "no pixels": ({"x": X[:, :0], "y": Y}, r"x has shape \(60, 0, 10, 3\)"),
    "unclear channels": ({"x": X[:, :3, :, :], "y": Y}, "cannot tell which axis"),
    "too many channels": ({"x": np.zeros((60, 9, 9, 9), np.uint8), "y": Y}, "cannot tell which axis"),
    "float labels": ({"x": X, "y": Y / 2}, "y is float64, but labels must be integers"),
    "one-hot labels": ({"x": X, "y": np.eye(3, dtype=int)[Y]}, r"y has shape \(60, 3\)"),
    "too few labels": ({"x": X, "y": Y[:59]}, r"it must be \(60,\)"),
    "negative labels": ({"x": X, "y": Y - 1}, "the label -1"),
    "no images": ({"x": X[:0], "y": Y[:0]}, "no training images"),
    "no labels": ({"x": X}, r"needs the arrays x_train.*\(it holds x\)"),
    "other names": ({"images": X, "labels": Y}, r"\(it holds images, labels\)"),
    "two shapes": ({"x_train": X, "y_train": Y, "x_test": X[:, :8, :8], "y_test": Y}, "must be alike"),
}


@pytest.mark.parametrize(("arrays", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_arrays(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(write(tmp_path, **arrays))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_no_archives(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file"):
        load(f"npz:{tmp_path / 'none.npz'}")
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UserError, match="not an npz archive"):
        load(f"npz:{broken}")
    whole = Path(write(tmp_path, x=X, y=Y).removeprefix("npz:")).read_bytes()
    broken.write_bytes(whole[:200] + bytes(100) + whole[300:])
    with pytest.raises(UserError, match="cannot read"):
        load(f"npz:{broken}")
