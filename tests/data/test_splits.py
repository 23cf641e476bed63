from __future__ import annotations

import pytest
import torch

from fastnas.data.seeds import Use, generator, mix
from fastnas.data.splits import check_batch_size, count_classes, hold_out, stratified
from fastnas.errors import UserError


def test_mix_depends_on_every_value_and_on_their_order() -> None:
    seeds = {mix(), mix(0), mix(0, 0), mix(1), mix(0, 1), mix(1, 0), mix(-1), mix(1 << 40)}
    assert len(seeds) == 8
    assert all(0 <= seed < 1 << 63 for seed in seeds)
    # The CPU generator keeps 32 bits of its seed: neighbours must differ there too.
    assert len({mix(Use.DRAWS, 0, step) & 0xFFFFFFFF for step in range(10000)}) > 9990


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_parts_are_disjoint_and_cover_all_rows(size: int, fraction: float) -> None:
    labels = torch.randint(0, 4, (size,), generator=generator(1))
    rest, part = stratified(labels, fraction, 5)
    assert torch.equal(torch.cat([rest, part]).sort().values, torch.arange(size))
    assert len(part) == round(size * fraction)


def test_each_class_is_split_at_the_fraction() -> None:
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate((3, 10, 100, 501))])
    labels = labels[torch.randperm(len(labels), generator=generator(2))]
    _, part = stratified(labels, 0.3, 0)
    shares = torch.bincount(labels[part], minlength=4)
    exact = torch.bincount(labels) * len(part) / len(labels)
    assert ((shares - exact).abs() < 1).all()


def test_split_follows_the_seed() -> None:
    labels = torch.arange(1000) % 10
    assert torch.equal(stratified(labels, 0.5, 3)[1], stratified(labels, 0.5, 3)[1])
    assert not torch.equal(stratified(labels, 0.5, 3)[1], stratified(labels, 0.5, 4)[1])


def test_hold_out_takes_a_fifth() -> None:
    rest, test = hold_out(torch.arange(1000) % 10)
    assert (len(rest), len(test)) == (800, 200)


def test_classes_are_counted_over_both_parts() -> None:
    assert count_classes("x", torch.tensor([0, 1]), torch.tensor([2]), None) == 3
    assert count_classes("x", torch.tensor([0, 1]), torch.tensor([2]), 7) == 7


@pytest.mark.parametrize(
    ("labels", "test_labels", "classes", "message"),
    [
        ([0, 9], [1], 5, "labels of x go up to 9 but --num-classes is 5: give at least 10"),
        ([0, 1], [5], 5, "go up to 5 but --num-classes is 5"),
        ([-1, 1], [0], None, "the label -1"),
        ([0, 0], [0], None, "only one class"),
        ([], [0], None, "no training images"),
        ([0, 1], [], None, "no test images"),
    ],
)
def test_bad_labels(labels: list[int], test_labels: list[int], classes: int | None, message: str) -> None:
    as_tensor = [torch.tensor(values, dtype=torch.int64) for values in (labels, test_labels)]
    with pytest.raises(UserError, match=message):
        count_classes("x", *as_tensor, classes)


@pytest.mark.parametrize(
    ("batch", "rows", "world", "message"),
    [
        (0, 10, 1, "batch size 0 is too small"),
        (-3, 10, 1, "batch size -3 is too small"),
        (11, 10, 1, "larger than x .10 images.: the largest that works is 10"),
        (4, 0, 1, "x is empty"),
        (6, 10, 4, "cannot be shared equally by 4 processes"),
    ],
)
def test_bad_batch_sizes(batch: int, rows: int, world: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_batch_size(batch, rows, "x", world)
