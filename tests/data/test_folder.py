from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fastnas.data import folder, load
from fastnas.errors import UserError

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")
pytest.importorskip("torchvision", reason="needs torchvision")

CLASSES = ("ant", "bee", "cat")


def write_images(root: Path, each: int, suffix: str = ".png") -> None:
    """Class c has images of level 60*c + 20*row, with a bright left third; sizes vary."""
    for c, name in enumerate(CLASSES):
        (root / name / "deep").mkdir(parents=True)
        for row in range(each):
            pixels = np.full((20 + row, 30, 3), 60 * c + 5 * row, dtype=np.uint8)
            pixels[:, :10] = 255
            Image.fromarray(pixels).save(root / name / ("deep" if row % 2 else "") / f"{row}{suffix}")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plain")
    write_images(root, 10)
    (root / "ant" / "notes.txt").write_text("not an image")
    (root / ".cache").mkdir()
    return root


@pytest.fixture
def streamed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(folder, "RESIDENT_LIMIT", 0)
    yield


def batches(path: Path, steps: int = 4, start: int = 0, **options: int) -> list[tuple[Tensor, Tensor]]:
    data = load(f"folder:{path}", image_size=16, **options)
    return list(islice(data.train.stream(4, seed=2).from_step(start), steps))


def test_small_folder_is_resident(plain: Path) -> None:
    data = load(f"folder:{plain}", image_size=16)
    assert (data.num_classes, data.channels, data.image_size) == (3, 3, 16)
    assert (data.train_size, data.search_size, data.test_size) == (12, 12, 6)
    assert torch.equal(torch.bincount(data.test.labels), torch.tensor([2, 2, 2]))
    assert data.test.store.images.shape == (6, 3, 16, 16)
    # The grey right half of the picture is the class's colour, to within the rows' spread.
    for image, label in zip(data.test.store.images, data.test.labels, strict=True):
        assert 60 * label <= image[0, 8, 12] < 60 * label + 50
    assert load(f"folder:{plain}").image_size == 224


@pytest.mark.parametrize("part", ["test", "val"])
def test_train_and_test_folders(tmp_path: Path, part: str) -> None:
    write_images(tmp_path / "train", 4, ".jpg")
    write_images(tmp_path / part, 2, ".JPEG")
    (tmp_path / "test").mkdir(exist_ok=True)
    data = load(f"folder:{tmp_path}", image_size=16)
    assert (data.train_size + data.search_size, data.test_size) == (12, 6)
    if part == "val":
        assert load("imagenet", tmp_path, image_size=16).test_size == 6


def test_streamed_batches(plain: Path, streamed: None) -> None:
    data = load(f"folder:{plain}", image_size=16, cutout=4, workers=0)
    x, y = next(data.train.stream(8, seed=0).from_step(0))
    assert x.shape == (8, 3, 16, 16) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert (x == 0).flatten(1).sum(1).min() >= 12  # at least a quarter of the 4 x 4 square, in 3 channels
    shapes = [x.shape[0] for x, _ in data.test.batches(4)]
    assert shapes == [4, 2]


def test_streamed_evaluation_is_the_same_each_time(plain: Path, streamed: None) -> None:
    data = load(f"folder:{plain}", image_size=16, workers=0)
    first, second = next(data.test.batches(6)), next(data.test.batches(6))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], data.test.labels)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_streamed_batches(plain: Path, streamed: None, workers: int) -> None:
    for (x, y), (u, v) in zip(batches(plain, workers=0), batches(plain, workers=workers), strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)


@pytest.mark.parametrize("workers", [0, 1])
def test_streaming_leaves_the_global_random_state_alone(plain: Path, streamed: None, workers: int) -> None:
    state = torch.manual_seed(1).get_state()
    before = batches(plain, workers=workers)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(batches(plain, workers=workers)[0][0], before[0][0])


def test_streamed_from_step_equals_skipping(plain: Path, streamed: None) -> None:
    whole = batches(plain, steps=5, workers=0)
    for (x, y), (u, v) in zip(whole[3:], batches(plain, steps=2, start=3, workers=0), strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)
    # A row that comes again in a later epoch is cropped anew.
    assert len({x.sum().item() for x, _ in whole}) == 5


def test_streamed_flip_can_be_turned_off(plain: Path, streamed: None) -> None:
    def brighter_left(flip: bool) -> float:
        data = load(f"folder:{plain}", image_size=16, workers=0, flip=flip)
        x = torch.cat([x for x, _ in islice(data.train_and_search.stream(24, seed=0).from_step(0), 3)])
        left, right = x[..., :8].mean((1, 2, 3)), x[..., 8:].mean((1, 2, 3))
        return ((left > right).float().sum() / (left != right).float().sum()).item()

    assert brighter_left(False) == 1.0
    assert 0.2 < brighter_left(True) < 0.8


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["streamed", "resident"])
def test_corrupt_image_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, workers: int) -> None:
    monkeypatch.setattr(folder, "RESIDENT_LIMIT", limit)
    write_images(tmp_path, 5)
    for broken in tmp_path.rglob("0.png"):
        broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(UserError, match=r"cannot read the image .*0\.png .*: repair it or remove it") as caught:
        list(islice(load(f"folder:{tmp_path}", image_size=16, workers=workers).train.stream(4).from_step(), 3))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_every_colour_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image = Image.fromarray(np.full((8, 8, 3), 255, dtype=np.uint8)).convert(mode)
    image.save(path, **({"transparency": b"\x00\x80"} if mode == "P" else {}))
    images = folder.decode([os.fspath(path)], 4, 0)
    assert images.shape == (1, 3, 4, 4) and (images >= 250).all()


def test_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no folder {tmp_path / 'none'}"):
        load(f"folder:{tmp_path / 'none'}")
    with pytest.raises(UserError, match=f"no class folders in {tmp_path}"):
        load(f"folder:{tmp_path}")
    (tmp_path / "ant").mkdir()
    with pytest.raises(UserError, match=f"no images in {tmp_path / 'ant'}"):
        load(f"folder:{tmp_path}")
    with pytest.raises(UserError, match="needs a path after the colon"):
        load("folder:")
    with pytest.raises(UserError, match=f"imagenet was not found in {tmp_path} .*{tmp_path / 'train'}"):
        load("imagenet", tmp_path)


def test_one_class_is_not_enough(tmp_path: Path) -> None:
    write_images(tmp_path / "up", 5)
    with pytest.raises(UserError, match="only one class"):
        load(f"folder:{tmp_path}", image_size=16)


def test_class_of_the_test_set_must_be_known(tmp_path: Path) -> None:
    write_images(tmp_path / "train", 2)
    write_images(tmp_path / "test", 2)
    (tmp_path / "test" / "dog").mkdir()
    with pytest.raises(UserError, match="has the class dog"):
        load(f"folder:{tmp_path}", image_size=16)
