from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch import Tensor

from fastnas.data import Split
from fastnas.data.augment import Recipe, crop_and_flip, cutout_
from fastnas.data.resident import Resident, resize
from fastnas.data.seeds import generator
from fastnas.errors import UserError

PLAIN = Recipe((0.0,), (1.0,), pad=1, flip=True, cutout=2)


def make_split(rows: int = 50, recipe: Recipe = PLAIN, seed: tuple[int, ...] = (0, 0)) -> Split:
    """Row i is an image of level i everywhere with label i, so a batch shows which rows it holds."""
    images = torch.arange(rows, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, 8, 8)
    store = Resident(images, torch.arange(rows), torch.device("cpu"))
    return Split("the training part of levels", store, torch.arange(rows), recipe, seed)


def take(stream: object, steps: int, start: int = 0) -> list[tuple[Tensor, Tensor]]:
    return list(islice(stream.from_step(start), steps))


def same(a: list[tuple[Tensor, Tensor]], b: list[tuple[Tensor, Tensor]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


def test_batch_is_a_function_of_the_step() -> None:
    stream = make_split().stream(8, seed=3)
    whole = take(stream, 20)
    for start in (1, 5, 6, 7, 19):
        assert same(take(stream, 20 - start, start), whole[start:])
    assert same(take(make_split().stream(8, seed=3), 20), whole)
    first, second = stream.from_step(2), stream.from_step(9)
    interleaved = [next(first), next(second), next(first), next(second)]
    assert same(interleaved, [whole[2], whole[9], whole[3], whole[10]])


def test_global_random_state_does_not_matter_and_is_left_alone() -> None:
    whole = take(make_split().stream(8, seed=3), 3)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert same(take(make_split().stream(8, seed=3), 3), whole)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("other", ["stream seed", "data seed", "split"])
def test_every_seed_changes_the_batches(other: str) -> None:
    seed = {"data seed": (1, 0), "split": (0, 1)}.get(other, (0, 0))
    changed = make_split(seed=seed).stream(8, seed=4 if other == "stream seed" else 3)
    (x, y), (u, v) = take(make_split().stream(8, seed=3), 1)[0], take(changed, 1)[0]
    assert not torch.equal(y, v) and not torch.equal(x, u)


def test_an_epoch_visits_each_row_once_in_its_own_order() -> None:
    stream = make_split(50).stream(8, seed=0, drop_last=False)
    assert len(stream) == 7
    epochs = [torch.cat([y for _, y in take(stream, 7, 7 * e)]) for e in range(3)]
    for order in epochs:
        assert torch.equal(order.sort().values, torch.arange(50))
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])


def test_drop_last_keeps_batches_whole() -> None:
    stream = make_split(50).stream(8, seed=0)
    assert len(stream) == 6
    batches = take(stream, 13)
    assert all(len(y) == 8 for _, y in batches)
    assert len(torch.cat([y for _, y in batches[:6]]).unique()) == 48


def test_ranks_share_each_batch() -> None:
    whole = take(make_split().stream(12, seed=1), 5)
    parts = [take(make_split().stream(12, seed=1, rank=r, world_size=3), 5) for r in range(3)]
    joined = [tuple(torch.cat(column) for column in zip(*batch, strict=True)) for batch in zip(*parts, strict=True)]
    assert same(joined, whole)


def test_without_augmentation_pixels_are_only_normalised() -> None:
    for x, y in take(make_split().stream(8, seed=1, augment=False), 7):
        torch.testing.assert_close(x, (y.float() / 255).view(-1, 1, 1, 1).expand(-1, 1, 8, 8))


def test_augmentation_reaches_the_stream() -> None:
    images = torch.randint(0, 256, (50, 1, 8, 8), dtype=torch.uint8, generator=generator(0))
    recipe = Recipe((0.0,), (1 / 255,), pad=1, flip=True, cutout=3)
    store = Resident(images, torch.arange(50), torch.device("cpu"))
    stream = Split("noise", store, torch.arange(50), recipe, (0, 0)).stream(8, seed=1)
    for step, (x, y) in enumerate(take(stream, 3)):
        draws = stream.plan(step).draws
        expected = cutout_(crop_and_flip(images[y], draws, 1).float(), draws, 3)
        torch.testing.assert_close(x, expected)


def test_random_numbers_change_with_the_step() -> None:
    stream = make_split().stream(50, seed=1)
    assert not torch.equal(stream.plan(0).draws, stream.plan(1).draws)
    assert torch.equal(stream.plan(1).draws, make_split().stream(50, seed=1).plan(1).draws)


def test_batches_are_one_ordered_pass() -> None:
    split = make_split(50)
    batches = list(split.batches(16))
    assert [len(y) for _, y in batches] == [16, 16, 16, 2]
    assert torch.equal(torch.cat([y for _, y in batches]), split.labels)
    assert torch.equal(torch.cat([x for x, _ in batches])[:, 0, 0, 0], torch.arange(50) * torch.tensor(1 / 255))
    assert len(list(split.batches(64))) == 1


def test_wrong_use() -> None:
    split = make_split(10)
    with pytest.raises(UserError, match="the largest that works is 10"):
        split.stream(11, seed=0)
    with pytest.raises(UserError, match="at least 1"):
        split.batches(0)
    with pytest.raises(UserError, match="cannot be shared"):
        split.stream(5, seed=0, world_size=2)
    with pytest.raises(ValueError, match="rank"):
        split.stream(4, seed=0, rank=2, world_size=2)
    with pytest.raises(ValueError, match="drop_last"):
        split.stream(4, seed=0, world_size=2, drop_last=False)
    with pytest.raises(ValueError, match="step"):
        split.stream(4, seed=0).from_step(-1)


def test_resize_crops_to_a_square_and_averages() -> None:
    images = torch.zeros(2, 3, 8, 12, dtype=torch.uint8)
    images[:, :, :, 2:6] = 200
    images[:, :, :, :2] = images[:, :, :, 10:] = 77
    small = resize(images, 2)
    assert small.shape == (2, 3, 2, 2) and small.dtype == torch.uint8
    assert (small[..., 0] > 150).all() and (small[..., 1] < 50).all()
    assert torch.equal(resize(images, 8), images[:, :, :, 2:10])
