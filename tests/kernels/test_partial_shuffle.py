from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastnas
from fastnas.reference.partial_shuffle import partial_shuffle as reference
from fastnas.testing import DTYPES

PATHS = 3
SHAPES = {  # images, channels, K, height, width
    "one-pixel": (1, 2, 2, 1, 1),
    "odd": (3, 6, 2, 7, 9),
    "large": (2, 16, 4, 20, 20),
    "wide-group": (2, 12, 3, 5, 8),
    "all-mixed": (2, 4, 1, 6, 6),
}


def inputs(name: str, stride: int, subset: bool, last: bool, dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None]:
    """The weights, the bypass and the mixed tensors of a case, and its channels."""
    batch, total, k, height, width = SHAPES[name]
    count = total // k
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        return x.to(memory_format=torch.channels_last) if last else x

    x = draw(batch, total, height, width)
    mixed = [draw(batch, count, -(-height // stride), -(-width // stride)) for _ in range(PATHS)]
    weights = torch.softmax(torch.randn(PATHS, generator=generator), 0)
    channels = fastnas.sample_channels(total, k, generator) if subset else None
    return [weights, x if subset else x[:, count:], *mixed], channels


def caller(stride: int, channels: Tensor | None):
    def call(f, w: Tensor | None, bypass: Tensor, *mixed: Tensor) -> Tensor:
        return f(mixed, w, bypass, stride=stride, channels=channels)

    return call


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels-last"])
@pytest.mark.parametrize("subset", [False, True], ids=["shuffle", "subset"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "all-mixed"])
def test_value_and_every_gradient(
    check, device, name: str, stride: int, subset: bool, last: bool, dtype: torch.dtype
) -> None:
    tensors, channels = inputs(name, stride, subset, last, dtype)
    channels = None if channels is None else channels.to(device)
    check(caller(stride, channels), fastnas.partial_shuffle, reference, tensors)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_subset_of_all_channels(check, device, stride: int) -> None:
    tensors, channels = inputs("all-mixed", stride, True, False, torch.float32)
    check(caller(stride, channels.to(device)), fastnas.partial_shuffle, reference, tensors)


@pytest.mark.parametrize("subset", [False, True], ids=["shuffle", "subset"])
def test_empty_batch(device: torch.device, subset: bool) -> None:
    channels = torch.arange(2, device=device) if subset else None
    w = torch.rand(2, device=device, requires_grad=True)
    mixed = [torch.empty(0, 2, 2, 3, device=device, requires_grad=True) for _ in range(2)]
    bypass = torch.empty(0, 8 if subset else 6, 4, 5, device=device, requires_grad=True)
    y = fastnas.partial_shuffle(mixed, w, bypass, stride=2, channels=channels)
    assert y.shape == (0, 8, 2, 3)
    dw, dbypass, *_ = torch.autograd.grad(y, [w, bypass, *mixed], y)
    assert torch.equal(dw, torch.zeros_like(w))
    assert dbypass.shape == bypass.shape


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", ["cropped", "expanded", "transposed", "mixed strides"])
def test_any_strides(check, device, kind: str, stride: int) -> None:
    (w, bypass, *mixed), _ = inputs("large", stride, False, False, torch.float32)
    if kind == "cropped":
        bypass = torch.randn(2, 12, 30, 30)[:, :, 3:23, 5:25]
    elif kind == "expanded":
        bypass = bypass[:1].expand(bypass.shape)
    elif kind == "transposed":
        bypass, mixed = bypass.transpose(2, 3), [x.transpose(2, 3) for x in mixed]
    else:
        mixed[1] = mixed[1].to(memory_format=torch.channels_last)
    check(caller(stride, None), fastnas.partial_shuffle, reference, [w, bypass, *mixed])


def test_a_slice_of_the_input_is_not_copied(check, device) -> None:
    x = torch.randn(3, 8, 6, 6)
    call = lambda f, x, w: f([x[:, :2], 2 * x[:, :2]], w, x[:, 2:])  # noqa: E731
    check(call, fastnas.partial_shuffle, reference, [x, torch.rand(2)])


@pytest.mark.parametrize("last", [False, True], ids=["nchw", "channels-last"])
def test_plain_channel_shuffle_without_weights(check, device, last: bool) -> None:
    (_, bypass, mixed, *_), _ = inputs("odd", 1, False, last, torch.float32)
    check(caller(1, None), fastnas.partial_shuffle, reference, [None, bypass, mixed])


@pytest.mark.parametrize("frozen", ["weights", "bypass"])
@pytest.mark.parametrize("stride", [1, 2])
def test_frozen_inputs(device: torch.device, stride: int, frozen: str) -> None:
    tensors, _ = inputs("odd", stride, False, False, torch.float32)
    tensors = [t.to(device) for t in tensors]
    trained = [t for i, t in enumerate(tensors) if i != ("weights", "bypass").index(frozen)]
    for t in trained:
        t.requires_grad_()
    ours = caller(stride, None)(fastnas.partial_shuffle, *tensors)
    theirs = caller(stride, None)(reference, *tensors)
    torch.testing.assert_close(
        torch.autograd.grad(ours, trained, ours.detach()), torch.autograd.grad(theirs, trained, ours.detach())
    )


def test_pooling_treats_equals_and_nan_as_max_pool2d(device: torch.device) -> None:
    x = torch.randint(0, 2, (2, 3, 9, 7), generator=torch.Generator().manual_seed(0)).float().to(device)
    x[0, 0, 4, 4] = x[1, 2, 0, 1] = torch.nan
    x[1, 1] = -torch.inf
    mixed = torch.ones(2, 1, 5, 4, device=device)
    results = []
    for f in (fastnas.partial_shuffle, reference):
        leaf = x.clone().requires_grad_()
        y = f([mixed], None, leaf, stride=2)
        results.append((y, torch.autograd.grad(y, leaf, torch.arange(float(y.numel()), device=device).view_as(y))[0]))
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)
