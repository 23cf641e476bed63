"""Ops on shapes alone: the same shapes as real ones, no memory, and real numbers where no batch is involved."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor

from fastnas.ops import mixed_sum, partial_shuffle
from fastnas.profiler.fake import ShapesOnly

CASES = {
    "convolution": lambda x: F.conv2d(x, torch.ones(6, 1, 3, 3), stride=2, groups=6),
    "batch norm": lambda x: F.batch_norm(x, torch.zeros(6), torch.ones(6), training=True),
    "max pool": lambda x: F.max_pool2d(x, 3, 2, return_indices=True)[1],
    "view": lambda x: x[:, 1:, ::2].transpose(1, 2),
    "in place": lambda x: x.clone().mul_(2.0),
    "list": lambda x: torch.cat(x.split(2, dim=1)),
    "mixed_sum": lambda x: mixed_sum([x, x], torch.ones(2)),
    "partial_shuffle": lambda x: partial_shuffle([x[:, :2]], torch.ones(1), x[:, 2:]),
    "float64": lambda x: x.double() + 1,
}


@pytest.mark.parametrize("case", CASES)
def test_shapes_are_those_of_real_tensors_also_when_they_are_looked_up(case: str) -> None:
    run = CASES[case]
    shapes = ShapesOnly()
    fake = shapes.empty((2, 6, 8, 8), torch.float32)
    real = run(torch.zeros(2, 6, 8, 8))
    with shapes:
        for result in (run(fake), run(fake)):
            assert isinstance(result, FakeTensor)
            assert (result.shape, result.stride(), result.dtype) == (real.shape, real.stride(), real.dtype)
            assert result.device == real.device


def test_equal_keys_of_different_types_are_told_apart() -> None:
    shapes = ShapesOnly()
    x = shapes.empty((2,), torch.int64)
    with shapes:
        assert [(x + 1).dtype, (x + 1.0).dtype, (x + True).dtype] == [torch.int64, torch.float32, torch.int64]


def test_ops_on_real_tensors_run_and_writes_of_fakes_into_them_do_not() -> None:
    shapes = ShapesOnly()
    weight = torch.ones(3)
    with shapes:
        x = shapes.empty((3,), torch.float32)
        assert (weight * 2).tolist() == [2.0, 2.0, 2.0]
        assert weight.add_(x) is weight
        torch._foreach_add_([weight], [x])
    assert weight.tolist() == [1.0, 1.0, 1.0]


def test_numbers_read_from_fakes() -> None:
    shapes = ShapesOnly()
    with shapes:
        x = shapes.empty((3,), torch.float32)
        assert x.tolist() == [1.0, 1.0, 1.0]
        assert int(x.argmax()) == 0
        assert bool(torch.isfinite(x).all())


def test_gradients_reach_real_parameters() -> None:
    shapes = ShapesOnly()
    layer = torch.nn.Linear(10**4, 3)
    with shapes:
        layer(shapes.empty((10**7, 10**4), torch.float32)).sum().backward()  # 400 GB, if it were there
    assert layer.weight.grad.shape == layer.weight.shape


def test_a_detached_fake_shares_its_storage() -> None:
    shapes = ShapesOnly()
    with shapes:
        x = shapes.empty((4, 4), torch.float32)[1:, ::2]
        y = x.detach()
    assert (y.shape, y.stride(), y.storage_offset()) == (x.shape, x.stride(), x.storage_offset())
    assert y.untyped_storage()._cdata == x.untyped_storage()._cdata
