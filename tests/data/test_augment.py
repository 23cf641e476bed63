from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastnas.data.augment import (
    CENTRE_X,
    CENTRE_Y,
    FLIP,
    LEFT,
    TOP,
    Recipe,
    affine,
    channel_statistics,
    crop_and_flip,
    cutout_,
    draw,
    normalise,
)
from fastnas.data.seeds import generator

CASES = {
    "cifar": ((8, 3, 32, 32), 4),
    "grey odd": ((5, 1, 7, 7), 2),
    "one pixel": ((3, 2, 1, 1), 0),
    "no padding": ((4, 3, 8, 8), 0),
    "wide": ((4, 3, 6, 9), 1),
    "empty batch": ((0, 3, 8, 8), 1),
}


def recipe(pad: int = 4, flip: bool = True, cutout: int = 0) -> Recipe:
    return Recipe((0.5,), (0.25,), pad, flip, cutout)


def crop_and_flip_one(image: Tensor, top: int, left: int, flip: bool, pad: int) -> Tensor:
    """One image, with loops and no index arithmetic on whole batches."""
    _, height, width = image.shape
    out = torch.zeros_like(image)
    for i in range(height):
        for j in range(width):
            y, x = i + top - pad, j + left - pad
            if 0 <= y < height and 0 <= x < width:
                out[:, i, j] = image[:, y, x]
    return out.flip(-1) if flip else out


@pytest.mark.parametrize(("shape", "pad"), CASES.values(), ids=CASES.keys())
def test_crop_and_flip_equals_the_loop(shape: tuple[int, ...], pad: int) -> None:
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator(1))
    draws = draw(shape[0], shape[2], recipe(pad), generator(2))
    got = crop_and_flip(images, draws, pad)
    assert got.dtype == torch.uint8 and got.shape == images.shape
    for b in range(shape[0]):
        top, left, flip = (int(draws[row, b]) for row in (TOP, LEFT, FLIP))
        assert torch.equal(got[b], crop_and_flip_one(images[b], top, left, bool(flip), pad))


@pytest.mark.parametrize("length", [1, 2, 5, 16])
def test_cutout_blanks_one_clipped_square(length: int) -> None:
    x = torch.ones(200, 3, 16, 16)
    draws = draw(200, 16, recipe(), generator(3))
    cutout_(x, draws, length)
    for b in range(200):
        expected = torch.ones(16, 16)
        top = int(draws[CENTRE_Y, b]) - length // 2
        left = int(draws[CENTRE_X, b]) - length // 2
        expected[max(top, 0) : max(top + length, 0), max(left, 0) : max(left + length, 0)] = 0
        assert torch.equal(x[b], expected.expand(3, 16, 16))
    blank = (x[:, 0] == 0).sum(dim=(1, 2))
    assert blank.max() == length**2 and blank.min() >= 1


def test_draws_cover_their_ranges_evenly() -> None:
    draws = draw(20000, 32, recipe(pad=4), generator(4))
    for row, size in ((TOP, 9), (LEFT, 9), (FLIP, 2), (CENTRE_Y, 32), (CENTRE_X, 32)):
        counts = torch.bincount(draws[row], minlength=size)
        assert len(counts) == size
        assert (counts - 20000 / size).abs().max() < 5 * (20000 / size) ** 0.5
    # Rows are independent: a correlation of 20,000 pairs stays within a few hundredths.
    off_diagonal = torch.corrcoef(draws.double()) - torch.eye(6, dtype=torch.float64)
    assert off_diagonal.abs().max() < 0.04


def test_no_flip_means_no_flip() -> None:
    assert not draw(1000, 8, recipe(flip=False), generator(5))[FLIP].any()


def test_normalise_matches_the_formula() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 0.4)
    x = normalise(images, *affine(Recipe(mean, std, 0, False, 0), torch.device("cpu")))
    expected = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, expected.float(), rtol=1e-5, atol=1e-6)


def test_statistics_are_exact() -> None:
    images = torch.randint(0, 256, (4097, 3, 4, 4), dtype=torch.uint8, generator=generator(6))
    images[:, 2] = 7
    mean, std = channel_statistics(images)
    scaled = images.double() / 255
    torch.testing.assert_close(torch.tensor(mean), scaled.mean((0, 2, 3)).float())
    torch.testing.assert_close(torch.tensor(std)[:2], scaled.std((0, 2, 3), unbiased=False)[:2].float())
    x = normalise(images, *affine(Recipe(mean, std, 0, False, 0), torch.device("cpu")))
    assert torch.isfinite(x).all() and x[:, 2].abs().max() < 1e-4
