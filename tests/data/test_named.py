from __future__ import annotations

import pickle
import struct
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from fastnas.data import NAMES, Data, load
from fastnas.errors import UserError


@pytest.fixture(scope="module")
def digits() -> Data:
    return load("digits")


def test_digits(digits: Data) -> None:
    assert (digits.num_classes, digits.channels, digits.image_size) == (10, 1, 8)
    assert (digits.train_size, digits.search_size, digits.test_size) == (719, 719, 359)
    images = digits.test.store.images
    assert images.dtype == torch.uint8 and images.min() == 0 and images.max() == 255
    for split in (digits.train, digits.search, digits.test):
        shares = torch.bincount(split.labels) / len(split)
        assert (shares - 0.1).abs().max() < 0.01


def test_the_three_splits_are_disjoint(digits: Data) -> None:
    train, search = set(digits.train.rows.tolist()), set(digits.search.rows.tolist())
    assert not train & search
    assert train | search == set(digits.train_and_search.rows.tolist())
    assert digits.test.store is not digits.train.store
    assert digits.train.store is digits.search.store is digits.train_and_search.store


def test_seed_moves_the_search_split_but_never_the_test_set(digits: Data) -> None:
    other = load("digits", seed=1)
    assert torch.equal(other.test.store.images, digits.test.store.images)
    assert not torch.equal(other.search.rows, digits.search.rows)
    assert torch.equal(load("digits").search.rows, digits.search.rows)


def test_search_fraction() -> None:
    data = load("digits", search_fraction=0.25)
    assert (data.train_size, data.search_size) == (1438 - 360, 360)
    nothing = load("digits", search_fraction=0.0)
    assert (nothing.train_size, nothing.search_size) == (1438, 0)
    with pytest.raises(UserError, match="search part of digits is empty"):
        nothing.search.stream(4, seed=0)
    with pytest.raises(UserError, match="search part of digits is empty"):
        nothing.search.batches(4)


def test_train_fraction_takes_a_stratified_share_of_the_training_set() -> None:
    data = load("digits", search_fraction=0.025, train_fraction=0.1)
    assert (data.train_size, data.search_size) == (144, 36)
    assert not set(data.train.rows.tolist()) & set(data.search.rows.tolist())
    counts = torch.bincount(data.train.labels)
    assert counts.min() >= 13 and counts.max() <= 16
    assert torch.equal(data.search.rows, load("digits", search_fraction=0.025).search.rows)
    assert torch.equal(data.train.rows, load("digits", search_fraction=0.025, train_fraction=0.1).train.rows)
    assert load("digits", search_fraction=0.2, train_fraction=0.8).train_size == 1438 - 288
    with pytest.raises(UserError, match="it must be above 0 and at most 0.5"):
        load("digits", train_fraction=0.6)


def test_normalisation_comes_from_the_training_set(digits: Data) -> None:
    x = torch.cat([x for x, _ in digits.train_and_search.batches(512)])
    assert abs(x.mean().item()) < 1e-5 and abs(x.std().item() - 1) < 1e-3
    x = torch.cat([x for x, _ in digits.test.batches(512)])
    assert 0 < abs(x.mean().item()) < 0.1


def test_digits_are_never_mirrored(digits: Data) -> None:
    stream = digits.train.stream(700, seed=0)
    assert not any(stream.plan(step).draws[2].any() for step in range(20))
    assert load("digits", flip=True).train.stream(700, seed=0).plan(0).draws[2].any()


def test_digits_resized(digits: Data) -> None:
    data = load("digits", image_size=16, cutout=4)
    x, y = next(data.train.stream(32, seed=0).from_step(0))
    assert data.image_size == 16 and x.shape == (32, 1, 16, 16)
    coarse = torch.nn.functional.avg_pool2d(data.test.store.images.float(), 2)
    assert (coarse - digits.test.store.images.float()).abs().mean() < 20
    assert torch.equal(data.test.labels, digits.test.labels)


def test_num_classes() -> None:
    assert load("digits", num_classes=12).num_classes == 12
    with pytest.raises(UserError, match="labels of digits go up to 9 but --num-classes is 5"):
        load("digits", num_classes=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search_fraction": 1.0}, "search fraction 1.0"),
        ({"search_fraction": -0.1}, "search fraction -0.1"),
        ({"image_size": 0}, "image size 0 is too small"),
        ({"cutout": -1}, "cutout -1 is too small"),
        ({"cutout": 16}, "cutout 16 is larger than the images .8 x 8."),
        ({"workers": -1}, "workers -1 is too small"),
    ],
)
def test_wrong_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load("digits", **options)


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'cifar10'.*fashion-mnist"):
        load("cifra10")
    with pytest.raises(UserError, match=f"write folder:{tmp_path}"):
        load(str(tmp_path))
    assert all(text and "\n" not in text for text in NAMES.values())


def test_missing_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match="scikit-learn, which is not installed"):
        load("digits")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist"])
def test_missing_torchvision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UserError, match=f"{name} needs a torchvision .*pip install torchvision"):
        load(name, tmp_path)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("cifar10", "cifar-10-batches-py"),
        ("cifar100", "cifar-100-python"),
        ("fashion-mnist", "FashionMNIST/raw"),
    ],
)
def test_missing_files_are_named(tmp_path: Path, name: str, part: str) -> None:
    pytest.importorskip("torchvision", reason="needs torchvision")
    with pytest.raises(UserError, match=f"{name} was not found in {tmp_path} .*{part}.*--data-dir.*--download"):
        load(name, tmp_path)
    (tmp_path / part).mkdir(parents=True)
    with pytest.raises(UserError, match=f"{name} is damaged or incomplete in {tmp_path}"):
        load(name, tmp_path)


def test_cifar_in_torchvisions_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("torchvision.datasets", reason="needs torchvision")
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(datasets.CIFAR10, "_load_meta", lambda self: None)
    rng = np.random.default_rng(0)
    pixels = {}
    for name, key in (("cifar-10-batches-py", "labels"), ("cifar-100-python", "fine_labels")):
        (tmp_path / name).mkdir()
        files = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
        for file in files if key == "labels" else ["train", "test"]:
            pixels[file] = rng.integers(0, 256, (20, 3 * 32 * 32), dtype=np.uint8)
            labels = [i % (10 if key == "labels" else 100) for i in range(20)]
            (tmp_path / name / file).write_bytes(pickle.dumps({"data": pixels[file], key: labels}))
    data = load("cifar10", tmp_path, cutout=16)
    assert (data.num_classes, data.channels, data.image_size) == (10, 3, 32)
    assert (data.train_size, data.search_size, data.test_size) == (50, 50, 20)
    assert data.mean == (0.4914, 0.4822, 0.4465)
    expected = torch.from_numpy(pixels["test_batch"]).view(20, 3, 32, 32)
    assert torch.equal(data.test.store.images, expected)
    stream = data.train.stream(16, seed=0)
    assert any(stream.plan(step).draws[2].any() for step in range(3))
    blank = [(x[:, 0] == 0).flatten(1).sum(1) for x, _ in islice(stream.from_step(0), 4)]
    assert torch.cat(blank).min() >= 64 and torch.cat(blank).max() <= 260
    assert load("cifar10", tmp_path, image_size=16).mean != data.mean
    hundred = load("cifar100", tmp_path, num_classes=100)
    assert (hundred.num_classes, len(hundred.train_and_search), hundred.mean[0]) == (100, 20, 0.5071)


def test_fashion_mnist_in_torchvisions_format(tmp_path: Path) -> None:
    pytest.importorskip("torchvision", reason="needs torchvision")
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, rows in (("train", 40), ("t10k", 10)):
        images = rng.integers(0, 256, (rows, 28, 28), dtype=np.uint8)
        labels = (np.arange(rows) % 10).astype(np.uint8)
        head = struct.pack(">IIII", 0x803, rows, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, rows) + labels.tobytes())
    data = load("fashion-mnist", tmp_path)
    assert (data.num_classes, data.channels, data.image_size, data.test_size) == (10, 1, 28, 10)
    assert torch.equal(data.test.store.images[:, 0], torch.from_numpy(images))
    assert data.train.recipe.flip and data.train.recipe.pad == 3
